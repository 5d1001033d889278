#!/usr/bin/env bash
# From a fresh clone to a distilled model: sets up .venv, then runs recipes/quickstart.yaml.
#   usage: bash scripts/quickstart.sh [key=value ...]      e.g. stages.logits.tokens=3M
# Run it again to continue where it was stopped.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" ""

# Not through `accelerate launch`, which for one process would set OMP_NUM_THREADS=1 and hide the exit code.
exec python -m stages.run recipes/quickstart.yaml "$@"
