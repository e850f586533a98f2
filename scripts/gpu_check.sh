#!/usr/bin/env bash
# Checks titan_bridge on a machine with one or two GPUs: small models are made on the spot, each part has its own limit
# and log, and a table says PASS, FAIL or SKIP. Please attach out/gpu_check/report.json to what you report.
#   bash scripts/gpu_check.sh                     everything that this machine can: about half an hour
#   bash scripts/gpu_check.sh --only doctor fp32-llama3
#   bash scripts/gpu_check.sh --list
# Takes $PYTHON, else .venv-cuda, which it makes and installs '.[cuda]' into.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ -z "${PYTHON:-}" ]; then
    PYTHON=.venv-cuda/bin/python
    if [ ! -f .venv-cuda/installed ]; then
        echo "installing '.[cuda]' into .venv-cuda (log: .venv-cuda/setup.log)" >&2
        python3 -m venv --clear .venv-cuda
        "$PYTHON" -m pip install -e '.[cuda]' >.venv-cuda/setup.log 2>&1 || { tail -n 20 .venv-cuda/setup.log >&2; exit 1; }
        touch .venv-cuda/installed
    fi
fi
exec "$PYTHON" scripts/gpu_check.py "$@"
