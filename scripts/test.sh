#!/usr/bin/env bash
# Install the dev extra if needed, then run the tests: bash scripts/test.sh [--fast] [options of pytest]
# --fast: the unit tests alone, under two minutes on two cores.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" dev
if [ "${1:-}" = --fast ]; then
    set -- tests/unit "${@:2}"
fi
exec python -m pytest --numprocesses 2 --dist loadfile "$@"
