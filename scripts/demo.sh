#!/usr/bin/env bash
# Install if needed, then edit the demo model: bash scripts/demo.sh [more options of stableedit fit]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
# The demo model is so small that a second thread costs more than it brings.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec stableedit fit --config configs/demo.yaml --overwrite true "$@"
