"""How many attention groups there are, how attention is cut then, and the spellings that ask for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_parallelize_specs import MODELS
from titan_bridge import cli
from titan_bridge.config.reader import resolve as read_config
from titan_bridge.config.schema import InferConfig
from titan_bridge.engine.options import titan_options
from titan_bridge.errors import BridgeError
from titan_bridge.mesh import Sizes
from titan_bridge.models import family_for
from titan_bridge.policy.layers import Split, split
from titan_bridge.policy.schema import NO_POLICY, attention_width
from titan_bridge.testing import make_checkpoint


def split_of(name: str, tp: int, attention_dp: bool | int, policy: Any = NO_POLICY, **fields: Any) -> Split:
    hf = {**MODELS[name], **fields}
    family = family_for(hf)
    return split(policy, family, family.model_config(hf), Sizes(tp=tp), attention_dp=attention_dp)


@pytest.mark.parametrize(
    ("name", "tp", "heads", "asked", "groups"),
    [
        ("llama3", 2, 1, True, 2), ("llama3", 4, 1, True, 4), ("llama3", 4, 2, True, 2), ("llama3", 2, 2, True, 1),
        ("llama3", 8, 2, True, 4), ("llama3", 2, 2, 2, 2), ("llama3", 4, 2, 4, 4), ("llama3", 4, 4, 1, 1),
        ("llama3", 4, 2, False, 1), ("deepseek", 4, None, True, 4), ("deepseek", 4, None, 2, 2),
    ],
)  # fmt: skip
def test_true_is_as_many_groups_as_copies_of_the_cache(
    name: str, tp: int, heads: int | None, asked: bool | int, groups: int
) -> None:
    found = split_of(name, tp, asked, **({"num_key_value_heads": heads} if heads else {}))
    assert found.groups == groups
    widths = {found.plans[fqn].tp_size for fqn, layer in found.layers.items() if layer.kind == "attention"}
    plain = split_of(name, tp, False, **({"num_key_value_heads": heads} if heads else {}))
    assert found.policy == (attention_width(tp // groups) if groups > 1 else NO_POLICY)
    if groups > 1:
        assert widths == {tp // groups}
    else:
        assert found.plans == plain.plans


@pytest.mark.parametrize(
    ("tp", "heads", "asked", "said"),
    [
        (4, 1, 2, "attention_dp=2 does not fit tp=4 and n_heads=8, n_kv_heads=1: it must divide tp, and the ranks of a "
                  "group the heads; allowed: true, 4"),
        (4, 2, 3, "allowed: true, 2, 4"),
        (2, 2, 4, "allowed: true, 1, 2"),
    ],
)  # fmt: skip
def test_a_number_that_does_not_fit_is_refused(tp: int, heads: int, asked: int, said: str) -> None:
    with pytest.raises(BridgeError) as caught:
        split_of("llama3", tp, asked, num_key_value_heads=heads)
    assert said in str(caught.value)


def test_rules_must_say_the_same_of_attention() -> None:
    assert split_of("llama3", 2, 2, attention_width(1)).groups == 2
    with pytest.raises(
        BridgeError, match=r"attention_dp=2 cuts attention over tp/2 = 1 ranks, but parallelism says"
    ):
        split_of("llama3", 2, 2, attention_width(2))


def test_one_option_in_every_spelling(tmp_path: Path) -> None:
    def of(**flags: Any) -> Any:
        return titan_options(
            read_config(
                InferConfig, flags={"model": "m", "parallel.tp": 4, **flags}
            ).config.additional_config()
        ).attention_dp

    assert of(**{"parallel.attention_dp": True}) is True
    assert of(**{"parallel.attention_dp": 2}) == 2
    assert of() is False
    toml = tmp_path / "a.toml"
    toml.write_text('model = "m"\n[parallel]\ntp = 4\nattention_dp = true\n')
    assert read_config(InferConfig, file=str(toml)).config.parallel.attention_dp is True
    strategy = {"sharding": {"sharding_strategy": {"enable_dp_attention": 1}}}
    assert titan_options(strategy).attention_dp is True
    assert titan_options({"titan": {"attention_dp": 2}}).attention_dp == 2
    for flags, said in (
        ({"parallel.attention_dp": 2, "parallel.attn_tp": 2}, "leave attn_tp out"),
        ({"parallel.attention_dp": 0}, "parallel.attention_dp"),
        (
            {"vllm.additional_config": {"titan": {"attention_dp": 2}}},
            "attention_dp is set by parallel.attention_dp",
        ),
    ):
        with pytest.raises(BridgeError, match=said):
            of(**flags)


def test_the_flag_needs_no_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_checkpoint(tmp_path / "model", "qwen3", tokenizer=False, num_key_value_heads=1)
    rows = []
    for flags in (["--attention-dp"], ["--attention-dp", "2"], ["--attention-dp", "--tp", "2"]):
        assert cli.main(["inspect", str(model), "--tp", "2", "--layers", "--json", *flags]) == 0
        told = capsys.readouterr()
        rows.append(json.loads(told.out))
        assert (
            "attention_dp: 2 groups of 1 ranks with requests of their own; a token takes 512 bytes on each rank of its "
            "group, without groups 512 on each of tp=2: the same memory holds 2 times the tokens" in told.err
        )
    assert rows[0] == rows[1] == rows[2]
    assert {row["tp_size"] for row in rows[0] if row["kind"] == "attention"} == {1}
    assert cli.main(["inspect", str(model), "--tp", "2", "--attention-dp", "0"]) == 2
    assert "--attention-dp 0 is no number of groups" in capsys.readouterr().err
