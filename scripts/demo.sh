#!/usr/bin/env bash
# The whole story, from nothing: set-up; TorchTitan trains a Llama 3 and a Qwen3-MoE on the standard library's sources
# (two ranks each, FSDP and expert parallel) and saves DCP; vLLM serves those folders as they lie, at tp=2 and at
# tp=2 with expert parallelism; the engine's log-probabilities are held against TorchTitan's own forward pass, and for
# a checkpoint in Hugging Face format against transformers, too. Exit code 0 only if all parity holds.
set -euo pipefail
. "$(dirname "$0")/setup.sh"

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
bridge() { "$PYTHON" -m titan_bridge.cli "$@"; }
out=out/demo
mkdir -p "$out"

for run in llama3_fsdp2 qwen3_moe_ep2; do
    if [ ! -f "$out/$run.trained" ]; then # an interrupted run goes on from its last whole checkpoint
        titan_say "training configs/train/$run.toml into $out/$run (about two minutes on two cores)"
        bridge train "configs/train/$run.toml" --out "$out/$run"
        touch "$out/$run.trained"
    fi
done
if [ ! -f "$out/qwen3_moe/config.json" ]; then
    titan_say "making a random Qwen3-MoE in Hugging Face format in $out/qwen3_moe"
    rm -rf "$out/qwen3_moe.part"
    "$PYTHON" -c "from titan_bridge.testing import make_checkpoint; make_checkpoint('$out/qwen3_moe.part', 'qwen3_moe')"
    mv "$out/qwen3_moe.part" "$out/qwen3_moe"
fi

titan_say "what they learned to write: vLLM on the trainer's checkpoints, tp=2, the MoE with expert parallelism (ep=2)"
prompts=(--prompt "def __init__(self" --prompt "import " --max-tokens 48 --enforce-eager)
bridge generate "$out/llama3_fsdp2" --tp 2 "${prompts[@]}"
bridge generate "$out/qwen3_moe_ep2" --tp 2 --ep 2 "${prompts[@]}"

titan_say "parity in float32: the engine against TorchTitan's own forward on the same weights"
bridge parity "$out/llama3_fsdp2" --tp 2 --tolerance 1e-5
bridge parity "$out/qwen3_moe_ep2" --tp 2 --ep 2 --tolerance 1e-5
titan_say "parity in float32: the same for Hugging Face files, against transformers, too"
bridge parity "$out/qwen3_moe" --tp 2 --ep 2
titan_say "parity holds"
