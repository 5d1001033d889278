#!/usr/bin/env bash
# Everything a change must pass: sets up .venv with the development tools, then lint, format, types and tests.
#   usage: bash scripts/test.sh [pytest arguments]          e.g. -m 'not slow'   or   tests/distill/ssd

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" dev

ruff check .
ruff format --check .
mypy
if [ $# -gt 0 ]; then
    exec python -m pytest "$@"
fi
# A file's tests stay together: they share what is slow to make.
python -m pytest -m "not slow" -n auto --dist loadfile
exec python -m pytest -m slow -n auto --dist loadfile
