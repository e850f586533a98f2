#!/usr/bin/env bash
# TorchTitan trains a small Llama 3 on the standard library's sources; vLLM serves the last checkpoint, unconverted.
#   bash scripts/examples/train_then_serve.sh [OUT] [more options of titan-bridge train, e.g. --set trainer.training.steps=20]
# Run it again and training goes on where it stopped; `scripts/demo.sh` is longer, with a mixture of experts and parity.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python="${PYTHON:-.venv/bin/python}"
out="${1:-out/train_then_serve}"

"$python" -m titan_bridge.cli train configs/train/llama3_fsdp2.toml --out "$out" "${@:2}"
"$python" scripts/examples/serve_and_ask.py "$out" --prompt "def __init__(self" --prompt "import " \
    --log "$out/server.log" --tp 2 --enforce-eager --max-num-seqs 8
