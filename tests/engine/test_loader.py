"""`load_weights` on one rank's tensors, without an engine around it: what it copies, refuses and holds in memory."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from titan_bridge.engine.loading.stream import WeightLoader
from titan_bridge.errors import BridgeError
from titan_bridge.mesh import Sizes, padded_vocab
from titan_bridge.model_layout import layout, specs
from titan_bridge.models import family_for, load_hf_config
from titan_bridge.models.build import build_on_meta
from titan_bridge.sharding.layout import Layout
from titan_bridge.testing import make_checkpoint

pytestmark = [pytest.mark.engine, pytest.mark.timeout(200)]


def rank_of(
    model: Path, sizes: Sizes, rank: int, dense: Any = "replicate"
) -> tuple[WeightLoader, Layout, dict[str, torch.Tensor]]:
    """A loader over zeros in the shapes that `rank` holds."""
    hf = load_hf_config(model)
    family, rows = family_for(hf), padded_vocab(hf["vocab_size"], sizes)
    where = layout(hf, sizes, dense, dtype=torch.float32)
    live = {fqn: torch.zeros(where.local_shape(fqn, rank)) for fqn in where.params}
    optional = family.optional_views(hf, padded_vocab=rows)
    views = family.views(hf, padded_vocab=rows)
    return (
        WeightLoader(live, where, rank, views, optional, lambda name: family.ignores(name, hf)),
        where,
        live,
    )


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("m") / "moe", "qwen3_moe", vocab_size=777, tokenizer=False)


def whole_of(model: Path, tensors: dict[str, torch.Tensor], sizes: Sizes) -> dict[str, torch.Tensor]:
    """The global TorchTitan tensors, by writing whole views: the oracle."""
    hf = load_hf_config(model)
    whole = {fqn: torch.zeros(known.shape) for fqn, known in specs(hf, sizes).items()}
    for view in family_for(hf).views(hf, padded_vocab=padded_vocab(hf["vocab_size"], sizes)):
        view.write(whole[view.fqn], tensors[view.name])
    return whole


@pytest.mark.parametrize(
    ("sizes", "dense"),
    [
        (Sizes(tp=2), "replicate"),
        (Sizes(tp=2, ep=2), "replicate"),
        (Sizes(dp=2, tp=2, ep=4), "shard"),
        (Sizes(dp=2, tp=2, ep=2), "shard"),
        (Sizes(dp=2, tp=2), "shard"),
    ],
    ids=str,
)
def test_every_rank_gets_its_slices_and_reads_no_more(moe: Path, sizes: Sizes, dense: Any) -> None:
    tensors = load_file(moe / "model.safetensors")
    for scale in (1.0, -2.0):  # a second round of other weights lands in the same tensors
        given = {name: tensor * scale for name, tensor in tensors.items()}
        whole = whole_of(moe, given, sizes)
        for rank in range(sizes.world):
            loader, where, live = rank_of(moe, sizes, rank, dense)
            loaded = loader.load(iter(given.items()))
            assert {f"model.{fqn}" for fqn in live} == loaded
            for fqn, mine in live.items():
                for piece in where.pieces(fqn, rank):
                    assert torch.equal(mine[piece.local.slices], whole[fqn][piece.box.slices]), fqn
            padding = sizes.tp * -(-777 // sizes.tp) - 777
            assert 0 <= sum(t.nbytes for t in live.values()) - loader.bytes_read <= 2 * padding * 128 * 4


def test_weights_that_are_not_finite_are_told(moe: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = load_file(moe / "model.safetensors")
    tensors["model.norm.weight"][3:5] = torch.nan
    tensors["model.layers.1.mlp.experts.7.up_proj.weight"][0, 0] = torch.inf
    loader, _, _ = rank_of(moe, Sizes(tp=2, ep=2), 1)
    caplog.set_level(
        logging.WARNING, logger="vllm"
    )  # a command that ran in this process may have turned it off
    logging.getLogger("vllm").addHandler(caplog.handler)  # vLLM's loggers do not propagate
    try:
        loader.load(iter(tensors.items()))
    finally:
        logging.getLogger("vllm").removeHandler(caplog.handler)
    told = {record.getMessage() for record in caplog.records if record.levelname == "WARNING"}
    assert told == {
        "2 weights are NaN: norm.weight (2)",
        "1 weights are infinite: layers.1.moe.routed_experts.inner_experts.w3_EFD (1)",
    }


def test_all_offenders_are_named(moe: Path) -> None:
    tensors = load_file(moe / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(3)
    tensors["model.layers.1.input_layernorm.weight"] = torch.zeros(5)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)
    loader, _, _ = rank_of(moe, Sizes(tp=2), 1)
    with pytest.raises(BridgeError) as error:
        loader.load(iter(tensors.items()))
    text = str(error.value)
    assert "missing: model.norm.weight" in text
    assert "unexpected: model.layers.0.self_attn.q_proj.bias (3,)" in text
    assert "model.layers.1.input_layernorm.weight has shape (5,), the model needs (128,)" in text
    assert "lm_head.weight has dtype torch.int8, the model needs a floating-point type" in text
    assert "\n" not in text


def test_a_tied_head_may_be_repeated(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "tied", "llama3", tie_word_embeddings=True, tokenizer=False)
    tensors = load_file(model / "model.safetensors")
    loader, _, live = rank_of(model, Sizes(), 0)
    loader.load(iter({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}.items()))
    assert torch.equal(live["tok_embeddings.weight"], tensors["model.embed_tokens.weight"])


MEMORY = """
import json, resource, sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[2])
from test_loader import rank_of
from titan_bridge.mesh import Sizes
from safetensors import safe_open
from vllm.model_executor.model_loader.weight_utils import safetensors_weights_iterator
model = Path(sys.argv[1])
def anonymous():  # file pages that a mapping brings in can be dropped at any time and are not held
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024
loader, _, live = rank_of(model, Sizes(tp=2), 0)
for t in live.values():
    t.fill_(1)  # touch the live parameters before measuring
before = anonymous()
peak = before
largest = 0
def watched():
    global peak, largest
    for name, tensor in safetensors_weights_iterator([str(f) for f in sorted(model.glob("*.safetensors"))], False):
        largest = max(largest, tensor.nbytes)
        yield name, tensor
        peak = max(peak, anonymous())
loader.load(watched())
print(json.dumps({"extra": peak - before, "largest": largest, "read": loader.bytes_read,
                  "local": sum(t.nbytes for t in live.values())}))
"""


@pytest.mark.slow
def test_a_model_of_over_1_gb_needs_at_most_one_tensor_of_extra_memory(tmp_path: Path) -> None:
    model = make_checkpoint(
        tmp_path / "large", "qwen3", tokenizer=False, vocab_size=32_000, hidden_size=1024, head_dim=64,
        num_attention_heads=16, num_key_value_heads=8, intermediate_size=4096, num_hidden_layers=14,
        max_shard_size="400MB",
    )  # fmt: skip
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    assert size > 1e9
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(model), str(Path(__file__).parent)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    print(f"{size / 1e9:.2f} GB on disk: {facts}")
    assert facts["extra"] <= facts["largest"]
    assert facts["read"] == facts["local"]


def test_a_tied_head_is_allocated_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from titan_bridge.engine.model import build

    hf = load_hf_config(make_checkpoint(tmp_path / "m", "llama3", tie_word_embeddings=True, tokenizer=False))
    model = build_on_meta(family_for(hf).model_config(hf), dtype=torch.float32)
    build._localise(model)
    shapes, zeros_like = [], build.zeros_like
    monkeypatch.setattr(
        build, "zeros_like", lambda t, device: shapes.append(t.shape) or zeros_like(t, device)
    )
    build._materialise(model, torch.device("cpu"))
    assert model.lm_head is not None
    assert model.lm_head.weight is model.tok_embeddings.weight
    assert shapes.count(model.lm_head.weight.shape) == 1
