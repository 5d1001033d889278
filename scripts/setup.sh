#!/usr/bin/env bash
# Makes .venv beside this checkout and installs the project into it; sourced by quickstart.sh and test.sh.
#   usage: source scripts/setup.sh EXTRAS     ("" or "dev")
# A second call finds what it needs already there and returns in about a second.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras="${1:-}"
python="${PYTHON:-python3}"
venv="${VENV:-.venv}"

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "error: $python is $("$python" --version 2>&1 || echo missing); Python 3.11 or newer is needed." >&2
    echo "       Point to one with PYTHON=/path/to/python3.12 bash $0" >&2
    exit 2
fi

# What is installed is a function of these files and of the extras; the stamp remembers them.
stamp="$venv/.installed-${extras:-run}"
wanted="$("$python" --version) $(cksum <pyproject.toml)"
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    export PATH="$PWD/$venv/bin:$PATH"
    return 0
fi

echo "setting up $venv (once; about 1 GB to download where there is no GPU)"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
export PATH="$PWD/$venv/bin:$PATH"

if ! python -c 'import torch' 2>/dev/null; then
    if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
        python -m pip install --quiet 'torch>=2.7'
    else
        # Pinned: where no GPU is, this is a CPU build; the newest release would bring gigabytes of CUDA.
        python -m pip install --quiet 'torch==2.13.0'
    fi
fi
if [ "$extras" = dev ]; then
    # From source, next to the torch that is there, without compiling: ZeRO needs none of its kernels on a CPU.
    python -m pip install --quiet setuptools wheel ninja py-cpuinfo psutil packaging
    DS_BUILD_OPS=0 python -m pip install --quiet --no-build-isolation 'deepspeed>=0.19.8'
fi
python -m pip install --quiet --editable ".${extras:+[$extras]}"
echo "$wanted" >"$stamp"
