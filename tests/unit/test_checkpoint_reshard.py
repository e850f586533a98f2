"""Resharding between real files: bit for bit what TorchTitan's adapters give, and back again without a change."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torchtitan.models.deepseek_v3.state_dict_adapter import DeepSeekV3StateDictAdapter
from torchtitan.models.llama3.state_dict_adapter import Llama3StateDictAdapter
from torchtitan.models.qwen3 import model_registry
from torchtitan.models.qwen3.state_dict_adapter import Qwen3StateDictAdapter

from tests.unit.checkpoint_samples import of_rank
from titan_bridge.checkpoint import open_checkpoint, target
from titan_bridge.checkpoint.reshard import Options, Outcome, prepare
from titan_bridge.errors import BridgeError
from titan_bridge.mesh import Sizes
from titan_bridge.model_layout import layout as served_layout
from titan_bridge.models import family_for, family_of, load_hf_config
from titan_bridge.models.build import build_on_meta, materialize
from titan_bridge.run_folder import RECORD
from titan_bridge.testing import make_checkpoint

KINDS = {
    "llama3": ("llama3", {}),
    "llama3_tied": ("llama3", {"tie_word_embeddings": True, "num_key_value_heads": 8}),
    "qwen3": ("qwen3", {"vocab_size": 777}),
    "qwen3_tied": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_mixed": ("qwen3_moe", {"mlp_only_layers": [0], "num_hidden_layers": 3}),
    "deepseek_v3": ("deepseek_v3", {"num_key_value_heads": 8}),
    "gpt_oss": ("gpt_oss", {}),
}
ADAPTERS = {
    "llama3": Llama3StateDictAdapter,
    "qwen3": Qwen3StateDictAdapter,
    "deepseek_v3": DeepSeekV3StateDictAdapter,
}
"""TorchTitan's adapter for gpt-oss drops the experts."""
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "head_dim": 16,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint of a kind, made once."""
    base, known = tmp_path_factory.mktemp("models"), {}

    def make(kind: str) -> Path:
        if kind not in known:
            family, overrides = KINDS[kind]
            settings = SMALL | overrides | ({"head_dim": 8} if family == "llama3" else {})
            known[kind] = make_checkpoint(base / kind, family, max_shard_size="100KB", **settings)
        return known[kind]

    return make


def reshard(source: Path, target: Path, to: str, **options) -> Outcome:
    return prepare(Options(source=source, target=target, to=to, **options)).run()


def contents(path: Path) -> dict[str, torch.Tensor]:
    with open_checkpoint(path) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.tensors}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "gpt_oss"])
def test_to_dcp_equals_from_hf(made, tmp_path, kind):
    source = made(kind)
    outcome = reshard(source, tmp_path / "dcp", "dcp")
    hf = load_hf_config(source)
    config = family_for(hf).model_config(hf)
    files = {k: v for file in source.glob("*.safetensors") for k, v in load_file(file).items()}
    expected = ADAPTERS[family_for(hf).name](config, None).from_hf(dict(files))
    found = contents(tmp_path / "dcp")
    zeros = {name for name in found.keys() - expected.keys() if name.endswith("expert_bias_E")}
    assert all(not found.pop(name).any() for name in zeros)
    assert_same(found, expected)
    assert outcome.bytes_read == sum(tensor.nbytes for tensor in files.values())
    # What TorchTitan's model asks DCP for is there, under the names of its own state dict.
    model = build_on_meta(family_for(hf).model_config(hf, expert_bias=True), dtype=torch.float32)
    state = {name: torch.zeros(tensor.shape) for name, tensor in model.state_dict().items()}
    dcp.load(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "gpt_oss"])
def test_to_hf_equals_to_hf(made, tmp_path, kind):
    """From a DCP that torch wrote, with TorchTitan's values; expected is TorchTitan's adapter."""
    source = made(kind)
    hf = load_hf_config(source)
    family = family_for(hf)
    model = build_on_meta(family.model_config(hf), dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    state = {
        name: torch.empty(tensor.shape).normal_(generator=generator)
        for name, tensor in model.state_dict().items()
    }
    for alias, fqn in family.tied_names(hf).items():
        state[alias] = state[fqn]
    dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    expected = ADAPTERS[family.name](family.model_config(hf), None).to_hf(dict(state))
    outcome = reshard(tmp_path / "dcp", tmp_path / "hf", "hf", config=source, max_shard_size=150_000)
    assert_same(contents(tmp_path / "hf"), {name: tensor.contiguous() for name, tensor in expected.items()})
    assert outcome.bytes_read == sum(tensor.nbytes for tensor in expected.values())
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    assert len(set(index["weight_map"].values())) > 1
    for file in set(index["weight_map"].values()):
        assert load_file(tmp_path / "hf" / file).keys() == {
            n for n, f in index["weight_map"].items() if f == file
        }
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "hf" / name).is_file()


def test_transformers_loads_what_was_written(made, tmp_path):
    import transformers

    for kind in ("llama3_tied", "qwen3_moe", "deepseek_v3", "gpt_oss"):
        source, base = made(kind), tmp_path / kind
        reshard(source, base / "dcp", "dcp")
        reshard(base / "dcp", base / "hf", "hf", dtype=torch.bfloat16)
        own = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).state_dict()
        ours = transformers.AutoModelForCausalLM.from_pretrained(base / "hf", dtype="auto").state_dict()
        assert_same(ours, own)
        assert next(iter(ours.values())).dtype == torch.bfloat16  # config.json says so
        tokenizer = transformers.AutoTokenizer.from_pretrained(base / "hf")
        assert tokenizer.decode(tokenizer("def f(x):").input_ids) == "def f(x):"


@st.composite
def journeys(draw):
    kind = draw(st.sampled_from(list(KINDS)))
    steps = []
    for _ in range(draw(st.integers(1, 4))):
        to = draw(st.sampled_from(["hf", "dcp"]))
        options: dict = {"to": to, "max_shard_size": draw(st.sampled_from([40_000, 200_000, 10**9]))}
        options["workers"] = draw(st.sampled_from([1, 3]))
        steps.append(options)
    return kind, steps


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(journey=journeys())
def test_there_and_back_is_the_identity(made, tmp_path_factory, journey):
    kind, steps = journey
    base = tmp_path_factory.mktemp("journey")
    at = made(kind)
    for number, options in enumerate(steps):
        reshard(at, base / str(number), **options)
        at = base / str(number)
    reshard(at, base / "back", "hf")
    assert_same(contents(base / "back"), contents(made(kind)))
    shutil.rmtree(base)


@pytest.mark.parametrize("dense", ["replicate", "shard"])
@pytest.mark.parametrize(
    ("kind", "dp", "tp", "ep"),
    [
        ("qwen3", 2, 2, 1),
        ("qwen3_mixed", 2, 2, 4),
        ("qwen3_moe", 2, 2, 2),
        ("deepseek_v3", 2, 2, 4),
        ("gpt_oss", 2, 2, 1),
    ],
)
def test_every_rank_loads_its_local_shards(made, tmp_path, kind, dp, tp, ep, dense):
    source = made(kind)
    reshard(source, tmp_path / "dcp", "dcp")
    hf = load_hf_config(source)
    layout = served_layout(hf, Sizes(dp=dp, tp=tp, ep=ep), dense)
    # The oracle: global tensors put together by the views, cut by the pieces.
    rows = layout.param("tok_embeddings.weight").shape[0]
    whole = {fqn: torch.zeros(param.shape) for fqn, param in layout.params.items()}
    values = contents(source)
    for view in family_for(hf).views(hf, padded_vocab=rows):
        view.write(whole[view.fqn], values[view.name])
    assert layout.ranks == tuple(range(dp * tp))
    for rank in layout.ranks:
        for folder in (tmp_path / "dcp", source):
            for fqn, tensor in of_rank(folder, layout, rank, hf).items():
                expected = torch.zeros(layout.local_shape(fqn, rank))
                for piece in layout.pieces(fqn, rank):
                    expected[piece.local.slices] = whole[fqn][piece.box.slices]
                assert torch.equal(tensor, expected), (rank, fqn)


def test_a_model_with_separate_qkv_is_resharded(tmp_path):
    flavor = "debugmodel_non_fused_qkv"
    config = model_registry(flavor).model
    state = materialize(build_on_meta(config, dtype=torch.float32), "cpu").state_dict()
    for name, tensor in state.items():
        tensor.copy_(torch.randn(tensor.shape))
        assert "wqkv" not in name
    dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    reshard(tmp_path / "dcp", tmp_path / "hf", "hf", config=Path(f"qwen3:{flavor}"))
    hf, family = load_hf_config(tmp_path / "hf"), family_of(config)
    expected = {view.name: view.read(state[view.fqn]) for view in family.views(hf, fused_qkv=False)}
    assert_same(contents(tmp_path / "hf"), expected)


def test_casts_are_torchs(made, tmp_path):
    source = made("llama3")
    for dtype in (torch.bfloat16, torch.float16):
        reshard(source, tmp_path / str(dtype), "dcp", dtype=dtype)
        reshard(source, tmp_path / f"hf{dtype}", "hf", dtype=dtype)
        assert_same(contents(tmp_path / f"hf{dtype}"), {k: v.to(dtype) for k, v in contents(source).items()})
        reshard(tmp_path / str(dtype), tmp_path / f"back{dtype}", "hf")
        assert_same(contents(tmp_path / f"back{dtype}"), contents(tmp_path / f"hf{dtype}"))
        assert load_hf_config(tmp_path / f"back{dtype}")["dtype"] == str(dtype).removeprefix("torch.")


def test_a_small_strip_gives_the_same_files(made, tmp_path, monkeypatch):
    """Strips that end in the middle of heads, experts and rows."""
    source = made("qwen3_moe")
    reshard(source, tmp_path / "a", "dcp")
    reshard(tmp_path / "a", tmp_path / "b", "hf")
    monkeypatch.setattr(target, "STRIP_BYTES", 100)
    job = prepare(Options(source=source, target=tmp_path / "c", to="dcp", workers=3))
    assert sum(map(len, job.target.strips.values())) > 1000
    job.run()
    reshard(tmp_path / "c", tmp_path / "d", "hf", workers=3)
    for one, other in (("a", "c"), ("b", "d")):
        for file in (tmp_path / one).iterdir():
            if file.name != ".metadata":
                assert file.read_bytes() == (tmp_path / other / file.name).read_bytes(), file.name


def training_state(source: Path) -> dict:
    state = contents(source)
    generator = torch.Generator().manual_seed(3)
    moments = {
        f"state.{name}.{moment}": torch.empty(tensor.shape).normal_(generator=generator)
        for name, tensor in state.items()
        for moment in ("exp_avg", "exp_avg_sq")
    }
    lr = {f"param_groups.{name}.lr": 0.001 * number for number, name in enumerate(state)}
    return {
        **state,
        "optimizer": {**moments, **lr},
        "lr_scheduler": {"last_epoch": 12},
        "train_state": {"step": torch.tensor(12), "log_steps": [1, 2]},
    }


def test_optimizer_state_is_left_out_or_carried(made, tmp_path):
    reshard(made("llama3"), tmp_path / "model", "dcp")
    state = training_state(tmp_path / "model")
    dcp.save(state, checkpoint_id=tmp_path / "full", no_dist=True)
    reshard(tmp_path / "full", tmp_path / "without", "dcp", config=made("llama3"))
    assert_same(contents(tmp_path / "without"), contents(tmp_path / "model"))
    outcome = reshard(
        tmp_path / "full",
        tmp_path / "with",
        "dcp",
        with_optimizer=True,
        verify=True,
        dtype=torch.bfloat16,
        max_shard_size=300_000,
    )
    assert outcome.source_checked
    assert len(list((tmp_path / "with").glob("*.distcp"))) > 3
    # DCP's own reader loads all of it; only the model was cast.
    loaded = training_state(tmp_path / "model")
    for tensor in loaded["optimizer"].values():
        if isinstance(tensor, torch.Tensor):
            tensor.zero_()
    loaded["optimizer"] |= {
        name: -1.0 for name, value in loaded["optimizer"].items() if isinstance(value, float)
    }
    loaded["lr_scheduler"]["last_epoch"] = -1
    loaded["train_state"] = {"step": torch.tensor(0), "log_steps": [0, 0]}
    dcp.load(loaded, checkpoint_id=tmp_path / "with", no_dist=True)
    assert loaded["lr_scheduler"] == state["lr_scheduler"]
    assert loaded["train_state"] == state["train_state"]
    for name, value in state["optimizer"].items():
        found = loaded["optimizer"][name]
        assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value
    for name, tensor in contents(tmp_path / "model").items():
        assert torch.equal(loaded[name], tensor.bfloat16().float())
    with pytest.raises(BridgeError, match="DCP to DCP only"):
        reshard(tmp_path / "full", tmp_path / "x", "hf", with_optimizer=True, config=made("llama3"))


def test_nan_and_infinity_are_counted_and_kept(made, tmp_path):
    state = contents(made("llama3"))
    state["model.norm.weight"][3:5] = math.nan
    state["model.layers.1.mlp.up_proj.weight"][0, 0] = -math.inf
    state["model.layers.0.mlp.up_proj.weight"][0, :2] = 1e6  # too large for float16
    from safetensors.torch import save_file

    source = tmp_path / "nan"
    source.mkdir()
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(made("llama3") / "config.json", source)
    outcome = reshard(source, tmp_path / "dcp", "dcp")
    assert outcome.nan == {"norm.weight": 2}
    assert outcome.inf == {"layers.1.feed_forward.w3.weight": 1}
    assert int(contents(tmp_path / "dcp")["norm.weight"].isnan().sum()) == 2
    half = reshard(source, tmp_path / "half", "hf", dtype=torch.float16)
    assert half.inf == {"model.layers.1.mlp.up_proj.weight": 1, "model.layers.0.mlp.up_proj.weight": 2}


def test_hugging_face_to_hugging_face_needs_no_known_family(made, tmp_path):
    from safetensors.torch import save_file

    source = tmp_path / "other"
    source.mkdir()
    save_file({"a": torch.randn(9, 3), "n": torch.arange(4)}, source / "model.safetensors")
    (source / "config.json").write_text('{"architectures": ["Novel"]}')
    reshard(source, tmp_path / "out", "hf", dtype=torch.bfloat16)
    assert contents(tmp_path / "out")["a"].dtype == torch.bfloat16
    assert torch.equal(contents(tmp_path / "out")["n"], torch.arange(4))
    with pytest.raises(BridgeError, match="Novel is not supported"):
        reshard(source, tmp_path / "dcp", "dcp")


def test_torchtitans_own_models_need_no_config_file(tmp_path):
    from torchtitan.models.llama3 import model_registry

    model = build_on_meta(model_registry("debugmodel").model, dtype=torch.float32)
    state = {name: torch.randn(tensor.shape) for name, tensor in model.state_dict().items()}
    dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    reshard(tmp_path / "dcp", tmp_path / "hf", "hf", config=Path("llama3:debugmodel"))
    expected = Llama3StateDictAdapter(model_registry("debugmodel").model, None).to_hf(dict(state))
    assert_same(contents(tmp_path / "hf"), {name: tensor.contiguous() for name, tensor in expected.items()})
    reshard(tmp_path / "hf", tmp_path / "back", "dcp")  # its config.json is complete
    assert_same(contents(tmp_path / "back"), state)
    for config, message in (
        ("llama3:9B", "no such flavor"),
        ("gpt9:x", "no family"),
        ("nowhere", "does not exist"),
    ):
        with pytest.raises(BridgeError, match=message):
            reshard(tmp_path / "dcp", tmp_path / "x", "hf", config=Path(config))
    with pytest.raises(BridgeError, match="give one with --config"):
        reshard(tmp_path / "dcp", tmp_path / "x", "hf")


def test_a_training_run_stands_for_its_last_whole_step(made, tmp_path):
    source, run = made("qwen3"), tmp_path / "checkpoint"
    for step, sign in ((5, -1), (10, 1)):
        reshard(source, run / f"step-{step}", "dcp")
        with open_checkpoint(run / f"step-{step}") as checkpoint:
            state = {name: sign * checkpoint.read(name) for name in checkpoint.tensors}
        shutil.rmtree(run / f"step-{step}")
        dcp.save(state, checkpoint_id=run / f"step-{step}", no_dist=True)
    (run / "step-15").mkdir()  # killed before it was whole
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(source / name, run)
    reshard(run, tmp_path / "last", "hf")
    assert_same(contents(tmp_path / "last"), contents(source))
    assert (tmp_path / "last/tokenizer.json").is_file()
    reshard(run / "step-5", tmp_path / "first", "hf")
    assert_same(contents(tmp_path / "first"), {name: -tensor for name, tensor in contents(source).items()})
    (run / RECORD).write_text("{}")
    reshard(run.parent, tmp_path / "whole", "hf")  # the folder that `titan-bridge train --out` names
    assert_same(contents(tmp_path / "whole"), contents(source))
