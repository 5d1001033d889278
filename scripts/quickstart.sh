#!/usr/bin/env bash
# From a fresh clone to a distilled model: sets up .venv, then runs recipes/quickstart.yaml.
#   usage: bash scripts/quickstart.sh [key=value ...]      e.g. stages.logits.tokens=3M
# Run it again to continue where it was stopped.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" ""

exec accelerate launch --config_file recipes/launch/one_process.yaml -m stages.run recipes/quickstart.yaml "$@"
