#!/usr/bin/env bash
# From nothing to a TorchTitan model served by vLLM: set-up, a small Qwen3-MoE on the spot, generation with tensor and
# expert parallelism, and the proof that the numbers are right. Exit code 0 only if parity holds.
set -euo pipefail
. "$(dirname "$0")/setup.sh"

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
out=out/demo
model=$out/qwen3_moe
mkdir -p "$out"

if [ ! -f "$model/config.json" ]; then
    titan_say "making a small Qwen3-MoE in Hugging Face format in $model"
    rm -rf "$model.part"
    "$PYTHON" -c "from titan_bridge.testing import make_checkpoint; make_checkpoint('$model.part', 'qwen3_moe')"
    rm -rf "$model"
    mv "$model.part" "$model"
fi

titan_say "generating with tp=2 and expert parallelism (ep=2)"
"$PYTHON" -m titan_bridge.cli generate configs/infer/qwen3_moe_tp2_ep2.toml

titan_say "parity: vLLM's engine against transformers and against TorchTitan's own forward, fp32"
"$PYTHON" -m titan_bridge.cli parity configs/infer/qwen3_moe_tp2_ep2.toml
titan_say "parity holds"
