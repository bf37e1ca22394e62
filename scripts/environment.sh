# Sourced by the other scripts: makes a virtual environment with this project in it, and puts it first on PATH.
#   source scripts/environment.sh [EXTRA]      EXTRA: dev, devices or nothing
# STABLEEDIT_VENV names another place than .venv; STABLEEDIT_NO_INSTALL=1 takes it as it is.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
STABLEEDIT_VENV="${STABLEEDIT_VENV:-$PWD/.venv}"

_supported_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "Python 3.11 or newer is needed; name one with PYTHON=/path/to/python" >&2
    return 1
}

_installed_for() { # a mark is as new as the files that decide what is installed; dev includes all there is
    local mark
    for mark in "$STABLEEDIT_VENV/.stableedit-${1:-plain}" "$STABLEEDIT_VENV/.stableedit-dev"; do
        [ -e "$mark" ] && [ ! pyproject.toml -nt "$mark" ] && [ ! constraints.txt -nt "$mark" ] && return 0
    done
    return 1
}

if [ -z "${STABLEEDIT_NO_INSTALL:-}" ] && ! _installed_for "${1:-}"; then
    if [ ! -x "$STABLEEDIT_VENV/bin/python" ]; then
        python="$(_supported_python)"
        echo "Making a virtual environment in $STABLEEDIT_VENV with $python"
        "$python" -m venv "$STABLEEDIT_VENV"
    fi
    echo "Installing (once; the first time takes a few minutes)"
    "$STABLEEDIT_VENV/bin/python" -m pip install --quiet --disable-pip-version-check \
        -c constraints.txt -e ".${1:+[$1]}"
    touch "$STABLEEDIT_VENV/.stableedit-${1:-plain}"
fi
PATH="$STABLEEDIT_VENV/bin:$PATH"
