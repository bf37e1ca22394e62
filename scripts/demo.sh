#!/usr/bin/env bash
# Install if needed, then edit the demo model: bash scripts/demo.sh [more options of stableedit fit]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec stableedit fit --config configs/demo.yaml --overwrite true "$@"
