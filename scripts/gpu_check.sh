#!/usr/bin/env bash
# In one call, at most a quarter of an hour, on a machine with one large NVIDIA GPU: is everything right there, and how fast is it?
# Needs no network and installs nothing. Exit code 1 where anything computes something else than its reference does.
#   usage: bash scripts/gpu_check.sh [--folder docs/benchmarks]
#          PYTHON=/path/to/python bash scripts/gpu_check.sh       another interpreter than .venv's, or else python3
#          bash scripts/gpu_check.sh --device cpu --small         the same path through the code, on any machine

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ -n "${PYTHON:-}" ]; then python="$PYTHON"; elif [ -x .venv/bin/python ]; then python=.venv/bin/python; else python=python3; fi

# Named all at once, before anything is imported, so that one look says what the machine lacks.
"$python" - <<'CHECK'
import sys
from importlib.util import find_spec

needed = "torch transformers accelerate datasets safetensors tokenizers pydantic yaml typer rich jinja2 matplotlib numpy"
missing = [name for name in needed.split() if find_spec(name) is None]
if sys.version_info < (3, 11):
    sys.exit(f"error: {sys.executable} is Python {sys.version.split()[0]}; 3.11 or newer is needed (PYTHON=...)")
if missing:
    sys.exit(f"error: {sys.executable} has no {', '.join(missing)}. Use another one (PYTHON=...), or pip install -e .")
CHECK

# From the checkout, not from whatever version of it may be installed. A GPU machine may be without a network.
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec "$python" -m scripts.gpu_check "$@"
