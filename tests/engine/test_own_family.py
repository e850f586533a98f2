"""A model that another package brings, in vLLM: compiled, over HTTP, and with new weights while it is served."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tests import own_model
from tests.conftest import ROOT
from titan_bridge.transfer.options import Options
from titan_bridge.transfer.trainer import Trainer

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]

PROMPT = list(range(7, 47))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed package."""
    return own_model.install(tmp_path_factory.mktemp("own"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return own_model.make(tmp_path_factory.mktemp("own") / "model")


def test_a_compiled_engine_has_the_numbers_of_the_reference(
    site: Path, model: Path, bin_dir: Path, tmp_path: Path, no_orphans: None
) -> None:
    options = ["--tp", "2", "--no-enforce-eager", "--skip-tokenizer-init", "--json"]
    environment = {**own_model.found_in(site), "VLLM_CACHE_ROOT": str(tmp_path)}
    done = subprocess.run(
        [str(bin_dir / "titan-bridge"), "parity", str(model), *options],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["model_class"] == "titan_bridge.engine.model.wrapper.TitanForCausalLM"
    assert facts["sizes"]["tp"] == 2
    (row,) = facts["references"]
    print(f"max |difference| {row['max']:.1e}")
    assert row["reference"] == "TorchTitan"  # transformers does not know the model
    assert row["max"] <= 1e-4
    assert row["tokens"] > 1500
    assert row["diverged"] is None
    # Both ranks have left a compiled step.
    assert len(list(tmp_path.glob("torch_compile_cache/torch_aot_compile/*/rank_*/model"))) == 2


def test_a_server_with_spawned_workers_takes_new_weights(
    site: Path, model: Path, tmp_path: Path, serve: Any, no_orphans: None
) -> None:
    options = ["--tp", "2", "--enforce-eager", "--dtype", "float32", "--skip-tokenizer-init"]
    options += ["--max-model-len", "128", "--max-num-seqs", "1", "--served-model-name", "gated"]
    options += ["--weight-transfer-config", json.dumps({"backend": "titan"})]
    environment = {
        "PYTHONPATH": str(site),
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_SERVER_DEV_MODE": "1",
    }
    held = own_model.weights(0)

    def answers(url: str) -> list[float]:
        """Log-probabilities of the tokens of the prompt, but of the first."""
        body = {"model": "gated", "prompt": PROMPT, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        body |= {"detokenize": False, "return_token_ids": True}
        said = httpx.post(f"{url}/v1/completions", json=body, timeout=120)
        assert said.status_code == 200, said.text
        (choice,) = said.json()["choices"]
        return [next(iter(row.values()))["logprob"] for row in choice["prompt_logprobs"][1:]]

    def difference(url: str, tensors: Mapping[str, torch.Tensor]) -> float:
        expected_LV = own_model.logprobs(tensors, PROMPT)
        expected = expected_LV[torch.arange(len(PROMPT) - 1), PROMPT[1:]]
        return (torch.tensor(answers(url), dtype=torch.float64) - expected).abs().max().item()

    with serve(model, tmp_path / "server.log", *options, **environment) as url:
        assert difference(url, held) <= 1e-4
        trainer = Trainer(lambda: held, url, options=Options(seconds=60))
        trainer.connect()
        held = own_model.weights(1)
        trainer.send()
        after = difference(url, held)
        assert difference(url, own_model.weights(0)) > 0.1
        trainer.close()
    print(f"max |difference| after the transfer {after:.1e}")
    assert after <= 1e-4


DIGESTS = """
import sys
from pathlib import Path

import gated_model
from titan_bridge.engine.model.build import Setup
from titan_bridge.engine.model.compiled import _digest
from titan_bridge.engine.options import TitanOptions
from titan_bridge.mesh import Sizes
from titan_bridge.models import family_for, load_hf_config
from titan_bridge.policy.layers import split
from titan_bridge.policy.schema import NO_POLICY

hf, sizes = load_hf_config(sys.argv[1]), Sizes()
family = family_for(hf)
config = family.model_config(hf)
setup = Setup(
    hf=hf, family=family, config=config, sizes=sizes, options=TitanOptions(), padded_vocab=301, max_model_len=64,
    split=split(NO_POLICY, family, config, sizes),
)
first, second = _digest(setup), _digest(setup)
file = Path(gated_model.__file__).with_name("model.py")
file.write_text(file.read_text().replace("torch.sigmoid(", "torch.tanh("))
assert first == second != _digest(setup)
"""


def test_a_compiled_step_is_named_by_the_sources_of_the_package(model: Path, tmp_path: Path) -> None:
    environment = own_model.found_in(own_model.install(tmp_path), ROOT)
    done = subprocess.run(
        [sys.executable, "-c", DIGESTS, str(model)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
