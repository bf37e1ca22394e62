#!/usr/bin/env bash
# Install the dev extra if needed, then run the tests: bash scripts/test.sh [options of pytest]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" dev
exec python -m pytest --numprocesses 2 --dist loadfile "$@"
