"""What a parallelism policy says, decides and refuses, and the layouts that follow from it."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import DTensor

from tests.unit.test_parallelize_specs import MODELS, fake_world
from tests.unit.test_parallelize_specs import config_of as tree_of
from titan_bridge import cli
from titan_bridge.config.reader import resolve as read_config
from titan_bridge.config.schema import InferConfig
from titan_bridge.errors import BridgeError
from titan_bridge.mesh import Sizes, describe, divisors
from titan_bridge.model_layout import layout, specs
from titan_bridge.models import families, family_for
from titan_bridge.models.build import build_on_meta
from titan_bridge.parallelize import parallelize
from titan_bridge.policy.layers import Split, split
from titan_bridge.policy.read import policy_from, read_policy
from titan_bridge.policy.resolve import Layer, resolve
from titan_bridge.policy.schema import NO_POLICY, Match, Policy, attention_width
from titan_bridge.sharding.boxes import shard_dim
from titan_bridge.testing import make_checkpoint

DENSE_FIRST = {
    "axes": {"attn_tp": 2},
    "rules": [
        {"match": {"prefix_pattern": "layers.0.*"}, "plan": {"tp_size": 1}},
        {"match": {"kind": "attention"}, "plan": {"tp_size": "attn_tp"}},
        {"match": {"kind": "moe"}, "plan": {"tp_size": "tp", "ep_size": "ep"}},
    ],
}


def rule(plan: dict[str, Any], **match: str) -> dict[str, Any]:
    return {"match": match, "plan": plan}


def decide(model: str, rules: Any, sizes: Sizes, axes: dict[str, int] | None = None) -> Split:
    hf = MODELS[model]
    family = family_for(hf)
    policy = policy_from({"axes": axes or {}, "rules": rules}, "parallelism")
    return split(policy, family, family.model_config(hf), sizes)


def widths(found: Split) -> dict[str, int]:
    return {fqn: plan.tp_size for fqn, plan in found.plans.items()}


def test_the_first_rule_that_matches_decides():
    policy = policy_from(DENSE_FIRST, "policy")
    sizes = Sizes(dp=2, tp=4, ep=8)
    attention = Layer(kind="attention", flavor="gqa", divides={"n_heads": 8, "n_kv_heads": 4})
    for prefix, width, at in (("layers.0.attention", 1, 0), ("layers.10.attention", 2, 1)):
        plan = resolve(attention, prefix, policy, sizes)
        assert (plan.tp_size, plan.ep_size, plan.dcp_size, plan.rule) == (width, 1, 1, at)
    moe = resolve(Layer(kind="moe"), "layers.1.moe", policy, sizes)
    assert (moe.tp_size, moe.ep_size, moe.rule) == (4, 8, 2)
    assert resolve(Layer(kind="mlp"), "layers.1.feed_forward", policy, sizes).rule is None


def test_attention_takes_the_largest_width_that_divides_both_without_a_rule():
    for heads, kv, tp, width in ((8, 2, 4, 2), (8, 4, 4, 4), (24, 12, 8, 4), (32, 1, 8, 1), (32, 4, 8, 4)):
        layer = Layer(kind="attention", divides={"n_heads": heads, "n_kv_heads": kv})
        assert resolve(layer, "layers.0.attention", NO_POLICY, Sizes(tp=tp)).tp_size == width
    odd = Layer(kind="attention", divides={"n_heads": 8, "n_kv_heads": 4})
    assert resolve(odd, "x", NO_POLICY, Sizes(tp=3)).tp_size == 3, "vLLM refuses 8 heads on 3 ranks"


def test_no_policy_is_every_layer_over_all_of_tp():
    for name, hf in MODELS.items():
        sizes = Sizes(dp=2, tp=2, ep=1)
        assert specs(hf, sizes, "shard") == specs(hf, sizes, "shard", policy=None), name
        assert set(layout(hf, sizes).meshes) == {"dense"}


def test_a_model_with_fewer_kv_heads_than_ranks_says_what_it_costs():
    found = decide("llama3", [], Sizes(tp=4))
    assert found.remarks == (
        "attention of 2 layers is cut over 2 of tp=4 ranks, because n_heads=8, n_kv_heads=2; its weights and KV cache "
        "are held 2 times",
    )
    laid = layout(MODELS["llama3"], Sizes(tp=4))
    wqkv = "layers.0.attention.qkv_linear.wqkv.weight"
    assert [laid.pieces(wqkv, rank)[0].box.start[0] for rank in range(4)] == [0, 288, 0, 288]
    assert laid.meshes["dense_tp2"].array.tolist() == [[[[0, 1], [2, 3]]]]


def test_a_size_is_allowed_that_divides_query_heads_alone():
    with pytest.raises(
        BridgeError, match=r"^tp=16 does not divide n_heads=8; allowed for this model: 1, 2, 4, 8$"
    ):
        layout(MODELS["llama3"], Sizes(tp=16))
    assert set(layout(MODELS["llama3"], Sizes(tp=8)).meshes) == {"dense", "dense_tp2"}


def test_a_trainer_is_not_narrowed():
    with pytest.raises(BridgeError, match="tp=4 does not divide n_kv_heads=2"):
        layout(MODELS["llama3"], Sizes(tp=4), "shard", policy=None)


REFUSED: list[tuple[str, Sizes, Any, dict[str, int], str]] = [
    ("llama3", Sizes(tp=4), [rule({"tp_size": 3}, kind="mlp")], {},
     "parallelism.rules.0 (kind=mlp) for layers.0.feed_forward: tp_size=3 does not divide tp=4; allowed: 1, 2, 4"),
    ("llama3", Sizes(tp=4), [rule({"tp_size": 4}, kind="attention")], {},
     "tp_size=4 does not divide n_kv_heads=2; allowed: 1, 2"),
    ("llama3", Sizes(tp=2), [rule({"tp_size": "wide"}, kind="mlp")], {},
     "parallelism: rules.0 (kind=mlp): tp_size='wide' is no axis; allowed: a number, dp, ep, tp"),
    ("llama3", Sizes(tp=2), [rule({"tp_size": 1}, kind="mpl")], {}, "parallelism.rules.0.match.kind = 'mpl'"),
    ("llama3", Sizes(tp=2), [rule({"tp_sice": 1}, kind="mlp")], {}, "rules.0.plan.tp_sice is unknown"),
    ("llama3", Sizes(tp=2), [rule({}, kind="mlp")], {}, "plan says nothing"),
    ("llama3", Sizes(tp=2), [rule({"tp_size": 1})], {}, "match says nothing"),
    ("llama3", Sizes(tp=2), [rule({"tp_size": 0}, kind="mlp")], {}, "rules.0.plan.tp_size"),
    ("llama3", Sizes(tp=2), [rule({"tp_size": 1}, kind="mlp", attention_flavor="mla")], {},
     "attention_flavor is for kind attention, not mlp"),
    ("llama3", Sizes(tp=2), [rule({"tp_size": 1}, kind="mlp"), rule({"tp_size": 2}, kind="mlp")], {},
     "rules.1 (kind=mlp) is never reached: rules.0 (kind=mlp) matches all that it matches"),
    ("llama3", Sizes(tp=2),
     [rule({"tp_size": 1}, prefix_pattern="layers.*"), rule({"tp_size": 2}, prefix_pattern="layers.0.*")], {},
     "rules.1 (prefix_pattern=layers.0.*) is never reached"),
    ("llama3", Sizes(tp=2), [rule({"tp_size": 1}, kind="mlp")], {"tp": 4},
     "parallelism.axes.tp=4, but the model is started with tp=2"),
    ("llama3", Sizes(tp=4), [rule({"tp_size": "attn_tp"}, kind="attention")], {"attn_tp": 2, "dcp": 1},
     "attn_tp=2 times dcp=1 is not tp=4"),
    ("llama3", Sizes(tp=2), [rule({"dcp_size": 2}, kind="attention")], {},
     "dcp_size=2 needs an attention that returns log-sum-exps"),
    ("qwen3-tied", Sizes(tp=2), [rule({"tp_size": 1}, kind="lm_head")], {},
     "tok_embeddings tp_size=2, lm_head tp_size=1, but they are one parameter here"),
    ("qwen3-moe", Sizes(tp=2, ep=2), [rule({"tp_size": 1}, kind="moe")], {},
     "tp_size=1, but experts over ep=2 add up over all tp ranks; allowed: 2"),
    ("qwen3-moe", Sizes(tp=2, ep=2), [rule({"ep_size": 1}, kind="moe")], {}, "ep_size=1, but ep=2 ranks share"),
    ("deepseek", Sizes(tp=2), [rule({"tp_size": 1}, kind="shared_expert")], {},
     "a shared expert adds to its MoE's partial sums; allowed: 2, as layers.1.moe has"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("model", "sizes", "rules", "axes", "said"), REFUSED, ids=[case[-1][-40:] for case in REFUSED]
)
def test_refused_in_one_line_with_rule_and_value(
    model: str, sizes: Sizes, rules: Any, axes: dict[str, int], said: str
):
    with pytest.raises(BridgeError) as caught:
        decide(model, rules, sizes, axes)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_family_takes_a_policy_only_if_it_says_so(monkeypatch: pytest.MonkeyPatch):
    family = next(family for family in families() if family.name == "llama3")
    monkeypatch.setattr(type(family), "takes_policy", False)
    with pytest.raises(BridgeError, match="family 'llama3' takes no policy"):
        decide("llama3", [rule({"tp_size": 1}, kind="mlp")], Sizes(tp=2))
    assert decide("llama3", [], Sizes(tp=2)).sizes == Sizes(tp=2)


def test_a_rule_that_decides_nothing_is_named():
    rules = [
        rule({"tp_size": 1}, kind="indexer"),
        rule({"tp_size": 1}, kind="attention", attention_flavor="gqa"),
        rule({"tp_size": 1}, kind="attention"),
    ]
    assert decide("llama3", rules, Sizes(tp=2)).remarks == (
        "parallelism.rules.0 (kind=indexer) does nothing: it matches no layer",
        "parallelism.rules.2 (kind=attention) does nothing: every layer that it matches is decided by an earlier rule",
    )


def test_mla_and_gqa_are_told_apart_and_a_shared_expert_goes_with_its_moe():
    rules = [
        rule({"tp_size": 2}, kind="attention", attention_flavor="gqa"),
        rule({"tp_size": 1}, kind="attention", attention_flavor="mla"),
        rule({"tp_size": 2}, kind="moe"),
    ]
    found = widths(decide("deepseek", rules, Sizes(tp=4)))
    assert {found[f"layers.{layer}.attention"] for layer in range(2)} == {1}
    assert (found["layers.1.moe"], found["layers.1.moe.shared_experts"]) == (2, 2)
    assert found["layers.0.feed_forward"] == 4


def test_policies_read_alike_from_toml_yaml_json_and_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    toml = tmp_path / "a.toml"
    toml.write_text(
        'model = "m"\n[parallel]\ntp = 4\n[parallelism.axes]\nattn_tp = 2\n'
        '[[parallelism.rules]]\nmatch = { prefix_pattern = "layers.0.*" }\nplan = { tp_size = 1 }\n'
        '[[parallelism.rules]]\nmatch = { kind = "attention" }\nplan = { tp_size = "attn_tp" }\n'
        '[[parallelism.rules]]\nmatch = { kind = "moe" }\nplan = { tp_size = "tp", ep_size = "ep" }\n'
    )
    expected = policy_from(DENSE_FIRST, "tables")
    config = read_config(InferConfig, file=toml).config
    assert config.policy == expected
    assert config.additional_config() == {"titan": {"parallelism": DENSE_FIRST}}
    assert cli.main(["config", str(toml), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parallelism.rules"]["value"] == DENSE_FIRST["rules"]
    toml.write_text(toml.read_text().replace("kind", "knd"))
    with pytest.raises(BridgeError, match=r"unknown key parallelism\.rules\.1\.match\.knd"):
        read_config(InferConfig, file=toml)
    (tmp_path / "p.json").write_text(json.dumps({"parallelism_rules": DENSE_FIRST}))
    (tmp_path / "p.yaml").write_text(
        "parallelism_rules:\n  axes: {attn_tp: 2}\n  rules:\n"
        "  - {match: {prefix_pattern: layers.0.*}, plan: {tp_size: 1}}\n"
        "  - {match: {kind: attention}, plan: {tp_size: attn_tp}}\n"
        "  - {match: {kind: moe}, plan: {tp_size: tp, ep_size: ep}}\n"
    )
    assert read_policy(tmp_path / "p.json") == read_policy(tmp_path / "p.yaml") == expected


def test_a_policy_file_with_mistakes_is_refused_by_name(tmp_path: Path):
    for text, said in (
        ("rules: []", "has rules; a policy file has the one key parallelism_rules"),
        ("a: [", "is not YAML or JSON"),
        ("parallelism_rules: {rules: [{match: {kind: mlp}}]}", "parallelism_rules.rules.0.plan"),
        ("parallelism_rules: {rule: []}", "parallelism_rules.rule is unknown"),
        ("parallelism_rules: {axes: {intra_tp: x}}", "parallelism_rules.axes.intra_tp = 'x': "),
        ("parallelism_rules: {axes: {str: 0}}", "parallelism_rules.axes.str = 0: "),
        (
            "parallelism_rules: {rules: [{match: {kind: mlp}, plan: {tp_size: [1]}}]}",
            "parallelism_rules.rules.0.plan.tp_size = [1]: ",
        ),
        (
            "parallelism_rules:\n  rules:\n  - {match: {kind: mlp}, plan: {tp_size: 2, 'tp_size': 4}}",
            ": line 3: 'tp_size' is given twice in one mapping; keep one",
        ),
        ('{"parallelism_rules": {"axes": {"a": 1},\n"axes": {"b": 2}}}', ": line 2: 'axes' is given twice"),
    ):
        file = tmp_path / "p.yaml"
        file.write_text(text)
        with pytest.raises(BridgeError) as caught:
            read_policy(file)
        assert str(caught.value).startswith(str(file))
        assert said in str(caught.value)
    file.write_text(
        "parallelism_rules:\n  rules:\n  - {match: {kind: mlp}, plan: &plan {tp_size: 1, ep_size: 1}}\n"
        "  - {match: {kind: moe}, plan: {<<: *plan, tp_size: 2}}\n"
    )
    assert read_policy(file).rules[1].plan.given == {
        "tp_size": 2,
        "ep_size": 1,
    }  # what is merged is not given twice


@pytest.mark.parametrize("backend", ["partial_dtensor", "spmd_types"])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_torchtitan_cuts_each_layer_as_its_plan_says(name: str, backend: Any):
    """`Module.parallelize` on real `ParallelDims`, for ranks of dp=2 x tp=4."""
    sizes = Sizes(dp=2, tp=4, ep=4 if name == "qwen3-moe" else 1)
    rules = [
        rule({"tp_size": 1}, prefix_pattern="layers.0.attention"),
        rule({"tp_size": 2}, kind="attention"),
    ]
    rules += [rule({"tp_size": 2}, kind="mlp")] + [rule({"tp_size": 2}, kind="moe")] * (sizes.ep == 1)
    if not MODELS[name].get("tie_word_embeddings"):
        rules += [rule({"tp_size": 1}, kind="lm_head")]
    sizes = decide(name, rules, sizes).sizes
    config = tree_of(MODELS[name], sizes)
    computed = specs(config, sizes, policy=None)
    assert {param.spec.mesh for param in computed.values()} >= {"dense", "dense_tp2"}
    for rank in (0, 3, 6):
        with fake_world(sizes, rank, backend):
            model = build_on_meta(config, dtype=torch.float32)
            parallelize(model, sizes, backend)
            for fqn, known in computed.items():
                tensor = dict(model.named_parameters()).get(fqn)
                if tensor is None:
                    continue
                mesh = describe(known.spec.mesh, sizes, rank=rank)
                local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                expected = known.spec.local_shape(known.shape, mesh.shape, mesh.coordinate(rank))
                assert tuple(local.shape) == expected, fqn


def test_the_short_form_is_a_rule_and_does_not_go_with_rules():
    short = {"model": "m", "parallel.tp": 4, "parallel.attn_tp": 2}
    assert read_config(InferConfig, flags=short).config.policy == attention_width(2)
    with pytest.raises(BridgeError, match=r"parallel\.attn_tp=2 is short for a rule"):
        read_config(InferConfig, flags=short | {"parallelism": DENSE_FIRST})
    given = {"vllm.additional_config": {"titan": {"parallelism": DENSE_FIRST}}}
    with pytest.raises(BridgeError, match="parallelism is set by parallelism"):
        read_config(InferConfig, flags=short | given)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("policy") / "model", "deepseek_v3", tokenizer=False)


def test_inspect_shows_rule_plan_bytes_and_cache_of_each_layer(
    model: Path, capsys: pytest.CaptureFixture[str]
):
    command = ["inspect", str(model), "--tp", "2", "--attention-tp", "1"]
    assert cli.main([*command, "--layers", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["layers.0.attention"] == {
        "name": "layers.0.attention", "kind": "attention", "rule": 0, "tp_size": 1, "ep_size": 1, "dcp_size": 1,
        "placements": ["dense(R, R, R)"],
        "weight_bytes": sum(
            4 * math.prod(param.shape)
            for fqn, param in layout(config_of(model), Sizes(tp=2)).params.items()
            if fqn.startswith("layers.0.attention.")
        ),
        "kv_bytes": 2 * 8 * 48 * 4,
        "latent_bytes": (32 + 16) * 4,
    }  # fmt: skip
    assert cli.main(["inspect", str(model), "--tp", "2", "--layers", "--json"]) == 0
    whole = {row["name"]: row for row in json.loads(capsys.readouterr().out)}["layers.0.attention"]
    assert (whole["kv_bytes"], whole["latent_bytes"]) == (8 * 48 * 4, (32 + 16) * 4)
    assert rows["layers.0.feed_forward"]["placements"] == ["dense(R, R, S(0))", "dense(R, R, S(1))"]
    assert cli.main(command) == 0
    table = capsys.readouterr().out
    assert "0: kind=attention" in table
    assert "caches 6,144 bytes a token; as latents 384" in table
    assert cli.main([*command, "--why", "layers.1.attention.wo"]) == 0
    said = capsys.readouterr().out
    assert "rules.0 (kind=attention): decides, tp_size=attn_tp" in said
    assert cli.main([*command, "--why", "layers.9"]) == 2
    assert "--why layers.9: the model has no such layer" in capsys.readouterr().err


def config_of(model: Path) -> dict[str, Any]:
    return json.loads((model / "config.json").read_text())


PATTERNS = [
    None,
    "*",
    "layers.*",
    "layers.0.*",
    "layers.?.*",
    "layers.[01].*",
    "layers.1.attention",
    "*.attention",
]
PATTERNS += ["layers.?.attention", "layers.*.attention"]


def test_a_rule_that_is_called_hidden_is_never_reached():
    kinds = [
        (None, None),
        ("attention", None),
        ("mlp", None),
        (None, "gqa"),
        ("attention", "gqa"),
        (None, "mla"),
    ]
    matches = [
        Match(kind=kind, attention_flavor=flavor, prefix_pattern=pattern)
        for kind, flavor in kinds
        for pattern in PATTERNS
        if kind or flavor or pattern
    ]
    layers = [
        (*what, f"layers.{number}.{name}")
        for number in (0, 1, 2, 10)
        for what, name in (
            (("attention", "gqa"), "attention"),
            (("attention", "mla"), "attention"),
            (("mlp", None), "feed_forward"),
        )
    ]
    hidden = 0
    for first, second in itertools.product(matches, matches):
        if first.covers(second):
            hidden += first != second
            assert all(first.fits(*layer) for layer in layers if second.fits(*layer)), (first, second)
    assert hidden > 300


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, Sizes, Policy, str]:
    """A model, sizes that it divides into, a policy, and how dense weights lie over dp."""
    model = draw(st.sampled_from(sorted(MODELS)))
    sizes = Sizes(dp=draw(st.sampled_from([1, 2])), tp=draw(st.sampled_from([1, 2, 4, 8])))
    if model not in ("llama3", "qwen3-tied") and draw(st.booleans()):
        ep = draw(st.sampled_from([n for n in divisors(sizes.most_ep) if 8 % n == 0]))
        sizes = Sizes(dp=sizes.dp, tp=sizes.tp, ep=ep)
    kinds = st.sampled_from(["attention", "mlp", "moe", "shared_expert", "embedding", "lm_head"])
    match = st.one_of(
        st.fixed_dictionaries({"kind": kinds}),
        st.fixed_dictionaries({"prefix_pattern": st.sampled_from(["layers.0.*", "layers.1.*", "*"])}),
    )
    plan = st.fixed_dictionaries({"tp_size": st.sampled_from([*divisors(sizes.tp), "tp", "narrow"])})
    rules = draw(st.lists(st.fixed_dictionaries({"match": match, "plan": plan}), max_size=4))
    axes = {"narrow": draw(st.sampled_from(divisors(sizes.tp)))}
    try:
        policy = policy_from({"axes": axes, "rules": rules}, "policy")
    except BridgeError:  # a rule that is never reached
        policy = NO_POLICY
    return model, sizes, policy, draw(st.sampled_from(["replicate", "shard"]))


@given(case=cases())
@settings(max_examples=60, deadline=None)
def test_ranks_hold_every_parameter_as_often_as_the_plan_says(case: tuple[str, Sizes, Policy, Any]):
    model, sizes, policy, dense = case
    hf = MODELS[model]
    family = family_for(hf)
    config = family.model_config(hf, padded_vocab=math.ceil(hf["vocab_size"] / sizes.tp) * sizes.tp)
    refused = None
    try:
        found = split(policy, family, config, sizes)
        laid = layout(hf, sizes, dense, policy=policy)
    except BridgeError as error:
        refused = str(error)
    if refused is not None:
        assert "\n" not in refused
        assert policy or "does not divide" in refused
        return
    assert found.plans == split(policy, family, config, sizes).plans
    assert found.plans.keys() == found.layers.keys()
    assert all(sizes.tp % plan.tp_size == 0 for plan in found.plans.values())
    for fqn, param in laid.params.items():
        owner = next((o for o in reversed(list(found.plans)) if fqn.startswith(f"{o}.")), None)
        width = sizes.tp if owner is None else found.plans[owner].tp_size
        pieces = [laid.pieces(fqn, rank) for rank in laid.ranks]
        count = Counter(piece.box for held in pieces for piece in held)
        assert sum(box.numel for box in count) == math.prod(param.shape), fqn
        where = describe(param.spec.mesh, sizes)
        cut = dict(zip(where.axes, param.spec.placements, strict=True))
        over_dp = where.shape[1] if shard_dim(param.spec.placements[1]) is not None else 1
        over = sizes.ep if param.spec.mesh == "sparse" else 1 if shard_dim(cut["tp"]) is None else width
        # Rows that dp does not divide leave the last ranks with less.
        if all(size % (over * over_dp) == 0 for size in param.shape):
            assert set(count.values()) == {sizes.world // over // over_dp}, (fqn, param)


def test_backends_that_count_the_heads_of_the_model_take_no_narrow_attention() -> None:
    from titan_bridge.engine.model.backends import check_backend

    hf = MODELS["deepseek"]
    family = family_for(hf)

    def decided(width: int):
        return split(attention_width(width), family, family.model_config(hf), Sizes(tp=2))

    check_backend("CPU_ATTN", decided(1))
    check_backend("FLEX_ATTENTION", decided(2))
    with pytest.raises(
        BridgeError, match=r"backend FLEX_ATTENTION counts heads .* layers\.0\.attention has tp_size=1"
    ):
        check_backend("FLEX_ATTENTION", decided(1))


def test_the_example_splits_what_it_says(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MODELS["qwen3-moe"]))
    example = Path(__file__).parents[2] / "scripts/examples/policy.yaml"
    command = ["inspect", str(tmp_path), "--tp", "4", "--policy", str(example)]
    assert cli.main([*command, "--layers", "--json", "--picture", str(tmp_path / "a.svg")]) == 0
    found = {row["name"]: row["tp_size"] for row in json.loads(capsys.readouterr().out)}
    assert {name: width for name, width in found.items() if width < 4} == {
        "layers.0.attention": 1, "layers.0.moe": 1, "layers.1.attention": 2, "lm_head": 1,
    }  # fmt: skip
    headings = set(re.findall(r"<!-- (\S+) mesh ", (tmp_path / "a.svg").read_text()))
    assert headings == {"dense", "dense_tp2"}
