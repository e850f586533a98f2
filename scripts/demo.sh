#!/usr/bin/env bash
# The whole story, from nothing: set-up; TorchTitan trains a Llama 3 and a Qwen3-MoE on the standard library's sources
# (two ranks each, FSDP and expert parallel) and saves DCP; vLLM serves those folders, unconverted, at tp=2 and at
# tp=2 with expert parallelism, and writes what they learned; the engine's log-probabilities are held against
# TorchTitan's own forward pass on the same weights. Exit code 0 only if all parity holds.
set -euo pipefail
. "$(dirname "$0")/setup.sh"

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
bridge() { "$PYTHON" -m titan_bridge.cli "$@"; }
out=out/demo # configs/infer/*.toml name the folders in it
mkdir -p "$out"

for run in llama3_fsdp2 qwen3_moe_ep2; do
    if [ ! -f "$out/$run.trained" ]; then # an interrupted run goes on from its last whole checkpoint
        titan_say "training configs/train/$run.toml into $out/$run (about two minutes on two cores)"
        bridge train "configs/train/$run.toml" --out "$out/$run"
        touch "$out/$run.trained"
    fi
done

if [ ! -f "$out/qwen3_moe/config.json" ]; then # it appears when it is complete
    titan_say "a copy of the second in Hugging Face format for transformers and others: $out/qwen3_moe"
    bridge reshard "$out/qwen3_moe_ep2" "$out/qwen3_moe" --to hf
fi

for file in llama3_tp2 qwen3_moe_tp2_ep2; do
    titan_say "what it learned to write: titan-bridge serve configs/infer/$file.toml"
    "$PYTHON" scripts/examples/serve_and_ask.py "configs/infer/$file.toml" --log "$out/$file.log"
done

titan_say "parity in float32: the engine against TorchTitan's own forward on the trainer's checkpoints"
bridge parity configs/infer/llama3_tp2.toml --tolerance 1e-5
bridge parity configs/infer/qwen3_moe_tp2_ep2.toml --tolerance 1e-5

titan_say "parity holds"
