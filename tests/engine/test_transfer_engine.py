"""Updates of a real engine: what it answers afterwards is what an engine started from those weights answers, bit for
bit; after a fault it answers as before."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import ROOT
from tests.engine.collectives import fail_resets, groups
from tests.engine.transfer_server import Request, Server
from titan_bridge.ports import free_port
from titan_bridge.sharding.layout import Layout
from titan_bridge.testing_processes import PlainClient, PlainRanks, door, plain_ranks
from titan_bridge.testing_samples import as_dtensors, local_part
from titan_bridge.transfer.clients import HTTPClient, LLMClient
from titan_bridge.transfer.errors import TransferError
from titan_bridge.transfer.options import Options
from titan_bridge.transfer.source import TensorSource
from titan_bridge.transfer.trainer import Trainer

pytestmark = [pytest.mark.engine, pytest.mark.timeout(280)]

SIZES = {"hidden_size": 64, "vocab_size": 777, "num_hidden_layers": 2}


class Engine:
    """A running engine; `client` reaches it from other processes."""

    def __init__(self, llm: Any, client: PlainClient, folder: Path) -> None:
        self.llm, self.client, self.folder = llm, client, folder
        self.fresh = self.answers()

    def answers(self) -> list[float]:
        """Log-probabilities of the tokens of a prompt and of its greedy continuation."""
        from vllm import SamplingParams

        given = SamplingParams(max_tokens=6, temperature=0, prompt_logprobs=0, logprobs=0, ignore_eos=True)
        prompt = {"prompt_token_ids": list(range(7, 47))}
        (output,) = self.llm.generate([prompt], given, use_tqdm=False)
        rows = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        return [next(iter(row.values())).logprob for row in rows]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A mixture of experts in bf16 at tp=2, ep=2, started from checkpoint a; a, b and their layout as files."""
    from titan_bridge.config.schema import InferConfig, Parallel
    from titan_bridge.engine.run.offline import engine as start
    from titan_bridge.mesh import Sizes
    from titan_bridge.model_layout import layout
    from titan_bridge.models import load_hf_config
    from titan_bridge.testing import make_checkpoint, titan_tensors

    folder = tmp_path_factory.mktemp("transfer")
    for seed, name in enumerate("ab"):
        make_checkpoint(folder / name, "qwen3_moe", seed=seed, dtype=torch.bfloat16, **SIZES)
        save_file(titan_tensors(folder / name), folder / f"{name}.safetensors")
    # The trainer's vocabulary is not padded; the engine's is.
    for name, sizes in {"trainer": Sizes(dp=2), "experts": Sizes(dp=2, ep=2)}.items():
        layout(load_hf_config(folder / "a"), sizes, "shard").write(folder / f"{name}.json")
    config = InferConfig(
        model=str(folder / "a"),
        parallel=Parallel(tp=2, ep=2),
        max_model_len=512,
        vllm={"enforce_eager": True, "weight_transfer_config": {"backend": "titan"}},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # to send a function to the workers
        with start(config) as (llm, _, _), door(LLMClient(llm), str(folder / "door")) as client:
            yield Engine(llm, client, folder)


@pytest.fixture(scope="module")
def trainers() -> Iterator[PlainRanks]:
    with plain_ranks(2) as ranks:
        yield ranks


def test_weights_by_hugging_face_names_through_vllms_own_factory(engine):
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    from titan_bridge.engine.transfer import TitanTrainerInitInfo, TitanWeightSource

    made = engine.llm.collective_rpc(groups)
    held = load_file(engine.folder / "b" / "model.safetensors")
    trainer = WeightTransferTrainerFactory.trainer_init(
        TitanTrainerInitInfo(rank=0, timeout_seconds=30),
        client=LLMClient(engine.llm),
        source=TitanWeightSource(lambda: held),
    )
    trainer.send_weights()
    assert engine.answers() != engine.fresh
    assert engine.llm.get_weight_version() == "1"
    held = load_file(engine.folder / "a" / "model.safetensors")
    trainer.send_weights("from a")
    assert engine.answers() == engine.fresh
    assert engine.llm.get_weight_version() == "from a"
    assert sum(trainer.report.received.values()) <= trainer.report.lower_bound
    trainer.shutdown()
    assert engine.llm.collective_rpc(groups) == made  # no process group is made for a transfer


def fsdp(folder: Path, name: str, rank: int, layout: str = "trainer") -> dict[str, torch.Tensor]:
    """fp32 masters of a checkpoint as DTensors of two FSDP ranks, or of two that share the experts ("experts")."""
    told = Layout.read(folder / f"{layout}.json")
    read = load_file(folder / f"{name}.safetensors")
    return as_dtensors({fqn: local_part(whole.float(), told, fqn, rank) for fqn, whole in read.items()}, told)


def connect(rank: int, world: int, engine: PlainClient, held: dict, seconds: float = 30) -> Trainer:
    options = Options(seconds=seconds, bucket_bytes=2**14)
    trainer = Trainer(lambda: held, engine, options=options)
    trainer.connect()
    return trainer


def dense_there_and_back(
    rank: int, world: int, client: PlainClient, folder: Path, layout: str = "trainer"
) -> None:
    held = fsdp(folder, "b", rank, layout)
    trainer = connect(rank, world, client, held)
    trainer.send()
    held |= fsdp(folder, "a", rank, layout)
    trainer.send()
    trainer.close()


@pytest.mark.parametrize("layout", ["trainer", "experts"])
def test_two_trainer_ranks_send_fp32_masters(engine, trainers, layout):
    trainers.run(dense_there_and_back, engine.client, engine.folder, layout)
    assert engine.answers() == engine.fresh


def send(rank: int, world: int, client: PlainClient, folder: Path, how: str) -> tuple[int, int]:
    """From a to a little away from a; the bytes that it took, and those of everything."""
    held = fsdp(folder, "a", rank)
    trainer = connect(rank, world, client, held)
    trainer.send()
    for tensor in held.values():
        local = tensor.to_local()
        local.view(-1)[::23] *= 1.5
    report = trainer.send(whole=how == "whole")
    assert report.kind == ("whole" if how == "whole" else "delta")
    if how == "back":  # to a, by what has changed
        held |= fsdp(folder, "a", rank)
        assert trainer.send().kind == "delta"
    assert trainer.verify() > 0
    trainer.close()
    return sum(report.received.values()), report.lower_bound


def test_a_delta_and_whole_weights_give_the_same_answers(engine, trainers):
    (came, whole), _ = trainers.run(send, engine.client, engine.folder, "delta")
    assert 1000 < came < whole / 4
    delta = engine.answers()
    assert delta != engine.fresh
    trainers.run(send, engine.client, engine.folder, "whole")
    assert engine.answers() == delta
    trainers.run(send, engine.client, engine.folder, "back")
    assert engine.answers() == engine.fresh


@pytest.mark.parametrize(("times", "served"), [(1, "b"), (3, "a")])
def test_a_reset_of_caches_that_fails_inside_a_commit(engine, times, served):
    """Nothing is written before it: the commit is tried again as it is, and what fails for good is not taken."""
    weights = {name: load_file(engine.folder / name / "model.safetensors") for name in "ab"}
    held = dict(weights["b"])
    with Trainer(held, engine.llm, options=Options(seconds=60)) as trainer:
        trainer.send("b")
        answers = {"a": engine.fresh, "b": engine.answers()}
        held |= weights["a"]
        trainer.send("a")
        engine.llm.collective_rpc(fail_resets, args=(times,))
        held |= weights["b"]
        if served == "b":
            trainer.send("b")
        else:
            with pytest.raises(TransferError, match="made to fail"):
                trainer.send("b")
        assert engine.llm.get_weight_version() == served
        assert engine.answers() == answers[served] != answers["ab".replace(served, "")]
        held |= weights["a"]
        trainer.send("a again")
        assert engine.llm.get_weight_version() == "a again"
        assert engine.answers() == engine.fresh


def test_reloaded_weights_are_the_base_of_no_delta(engine):
    """They differ in one element, which is in no sample."""
    shutil.copytree(engine.folder / "a", engine.folder / "c")
    weights = load_file(engine.folder / "a" / "model.safetensors")
    changed = {**weights, "model.embed_tokens.weight": weights["model.embed_tokens.weight"].clone()}
    changed["model.embed_tokens.weight"][8, 1] = 9.0
    save_file(changed, engine.folder / "c" / "model.safetensors", {"format": "pt"})
    with Trainer(dict(weights), engine.llm, options=Options(seconds=60)) as trainer:
        trainer.send()
        assert engine.answers() == engine.fresh
        engine.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(engine.folder / "c")})
        assert trainer.send().kind == "whole"
        assert engine.answers() == engine.fresh


class Positional(LLMClient):
    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._llm.collective_rpc("update_weights", args=(update_info,))


def test_a_client_may_give_its_arguments_by_position(engine):
    weights = load_file(engine.folder / "a" / "model.safetensors")
    with Trainer(weights, Positional(engine.llm), options=Options(seconds=60)) as trainer:
        trainer.send("by position")
    assert engine.llm.get_weight_version() == "by position"
    assert engine.answers() == engine.fresh


def test_a_call_out_of_order_leaves_the_engine_in_step(engine):
    for call in (engine.llm.finish_weight_update, lambda: engine.llm.update_weights({"update_info": {}})):
        with pytest.raises(Exception, match="start_weight_update"):
            call()
        assert [worker["rank"] for worker in engine.llm.collective_rpc("bridge_report")] == [0, 1]


class Fatal(dict):
    """Local tensors that kill the process when the fifth is taken for sending."""

    left = 5

    def __getitem__(self, name: str) -> torch.Tensor:
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(name)


class FatalSource(TensorSource):
    def local(self) -> dict[str, torch.Tensor]:
        return Fatal(super().local())


def dies(rank: int, world: int, client: PlainClient, folder: Path, victim: int) -> None:
    held = fsdp(folder, "b", rank)
    trainer = connect(rank, world, client, held, seconds=60)
    if rank == victim:
        trainer.source = FatalSource(lambda: held, rank=rank)
    with pytest.raises(TransferError):
        trainer.send()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_trainer_that_is_killed_leaves_the_old_weights(engine, trainers, victim):
    with plain_ranks(2) as mortal, pytest.raises(RuntimeError, match=f"rank {victim}: died"):
        mortal.run(dies, engine.client, engine.folder, victim)
    assert engine.answers() == engine.fresh
    trainers.run(dense_there_and_back, engine.client, engine.folder)
    assert engine.answers() == engine.fresh


@pytest.fixture(scope="module")
def server(engine: Engine, serve: Any) -> Iterator[Server]:
    options = ["--tp", "2", "--ep", "2", "--max-model-len", "2048", "--max-num-seqs", "1", "--enforce-eager"]
    options += ["--served-model-name", "moe", "--enable-prompt-tokens-details"]
    options += ["--weight-transfer-config", json.dumps({"backend": "titan"})]
    plugins = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_PLUGINS": "titan_bridge"}
    with serve(engine.folder / "b", engine.folder / "server.log", *options, **plugins) as url:
        running = Server(url)
        yield running
        running.client.close()


TOKENS = 250
AS_LONG_AS_IT_GOES = 2000
"""More tokens than an update takes, on a machine that has something else to do as well."""


@pytest.mark.parametrize(
    ("mode", "weights", "tokens", "ends"),
    [
        ("keep", "a", TOKENS, "length"),
        ("wait", "b", TOKENS, "length"),
        ("abort", "a", AS_LONG_AS_IT_GOES, "abort"),
    ],
)
def test_a_server_is_updated_while_it_answers(engine, server, mode, weights, tokens, ends):
    from titan_bridge.engine.transfer import TitanTrainerInitInfo, TitanWeightSource
    from titan_bridge.engine.transfer import TitanTrainerWeightTransferEngine as Sender

    held = load_file(engine.folder / weights / "model.safetensors")
    info = TitanTrainerInitInfo(rank=0, timeout_seconds=60, pause=mode)
    trainer = Sender.trainer_init(info, client=server.client, source=TitanWeightSource(lambda: held))
    try:
        server.cached()
        assert server.cached() > 0
        request = Request(server, tokens)
        assert request.begun.wait(60)
        trainer.send_weights(mode)
        came, reason = request.result()
        assert reason == ends
        assert came == tokens if ends == "length" else 0 < came < tokens
        assert server.cached() == 0
        # Bit for bit what an engine that was started from these weights says.
        assert server.answers() == {"a": engine.fresh, "b": server.fresh}[weights]
        assert server.get("/weight_info") == {"weight_version": mode}
        assert server.get("/is_paused") == {"is_paused": False}
        assert sum(trainer.report.received.values()) <= trainer.report.lower_bound
    finally:
        trainer.shutdown()


def test_requests_in_flight_may_keep_what_they_have_cached(engine, server):
    """Nothing of theirs is computed anew, and nothing that they cache, then or later, is served to another request."""
    held = load_file(engine.folder / "a" / "model.safetensors")

    def preempted() -> float:
        text = httpx.get(f"{server.url}/metrics", timeout=60).text
        return sum(float(value) for value in re.findall(r"^vllm:num_preemptions_total\S* (\S+)$", text, re.M))

    with Trainer(held, server.url, options=Options(pause="keep_cache", seconds=60)) as trainer:
        trainer.connect()
        server.cached()
        assert server.cached() > 0
        before, request = preempted(), Request(server, AS_LONG_AS_IT_GOES)
        assert request.begun.wait(60)
        trainer.send("kept")
        written = len(request.chunks)
        came, reason = request.result()
        assert (came, reason, preempted()) == (AS_LONG_AS_IT_GOES, "length", before)
        assert written < len(request.chunks)
        assert server.cached() == 0
        assert server.answers() == engine.fresh
        # The first blocks of the request's tokens are cached by another request now; the rest is not the request's.
        tokens = [5, 6, 7, *(token for chunk in request.chunks for token in chunk["token_ids"])]
        hits = []
        for count in (600, 1900):
            said = server.ask(prompt=tokens[:count], max_tokens=1)
            hits.append((said["usage"].get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
        assert hits[0] == 0
        assert hits[1] <= 600


def test_the_callers_pause_outlives_an_update(engine, server):
    held = load_file(engine.folder / "b" / "model.safetensors")
    with Trainer(held, server.url) as trainer:
        trainer.connect()
        request = Request(server, TOKENS)
        assert request.begun.wait(60)
        httpx.post(f"{server.url}/pause?mode=keep", timeout=60).raise_for_status()
        trainer.send("paused")
        assert server.get("/is_paused") == {"is_paused": True}
        httpx.post(f"{server.url}/resume", timeout=60).raise_for_status()
        assert request.result() == (TOKENS, "length")
        assert server.answers() == server.fresh


def test_vllms_own_client_leaves_no_stale_prefix_and_the_version_is_named(engine, server):
    """It knows neither of pauses nor of prefixes, and passes no version."""
    from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient

    held = load_file(engine.folder / "a" / "model.safetensors")
    server.cached()
    assert server.cached() > 0
    with Trainer(held, HTTPVLLMWeightSyncClient(server.url)) as trainer:
        trainer.send("by vllm")
        assert server.cached() == 0
        assert server.get("/weight_info") == {"weight_version": "by vllm"}
        assert server.answers() == engine.fresh
        assert trainer.verify() > 0


def test_the_trainer_of_the_readme_runs_as_printed(engine, server):
    readme = (ROOT / "README.md").read_text()
    (program,) = (block for block in re.findall(r"```python\n(.*?)```", readme, re.S) if "torchrun" in block)
    for printed, ours in (("DIR", engine.folder / "a"), ("localhost:8000", server.url[7:])):
        assert program.count(printed) == 1
        program = program.replace(printed, str(ours))
    trainer = engine.folder / "trainer.py"
    trainer.write_text(program)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(trainer)]
    command[3:3] = ["--master-port", str(free_port())]
    subprocess.run(command, check=True, timeout=200)
    assert server.get("/weight_info") == {"weight_version": "step 2"}
    assert server.answers() == engine.fresh


def test_calls_out_of_order_leave_a_server_in_step(server):
    answers, layout = server.answers(), server.get("/v1/sharding_spec")
    assert Layout.from_json(layout).meshes["sparse"].shape[-1] == 2
    client = server.client
    for call in (client.finish_weight_update, lambda: client.update_weights({}), client.start_weight_update):
        if call == client.start_weight_update:
            call()  # an error only when it comes twice
        with pytest.raises(RuntimeError, match=r"500 .*start_weight_update"):
            call()
        # Every worker answers; a reply that an error leaves behind would be read here.
        assert server.get("/v1/sharding_spec") == layout
    with pytest.raises(RuntimeError, match="during a weight update"):
        client.shutdown_weight_transfer_engine()
    client.finish_weight_update()
    # What no trainer sends, and an update without init: errors, after which no version is taken.
    version = server.get("/weight_info")
    terms = {"trainers": ["127.0.0.1:9"], "secret": "0" * 64, "run": "r"}
    update = {"link": "l", "number": 1, "version": "9", "token": "0" * 64}
    with pytest.raises(RuntimeError, match=r"500 .*init_info lacks the key link"):
        client.init_weight_transfer_engine(terms)
    for given, reason in ((terms, "update_info lacks the key link"), (update, "not initialized")):
        client.start_weight_update()
        with pytest.raises(RuntimeError, match=f"500 .*{reason}"):
            client.update_weights(given)
        with pytest.raises(RuntimeError, match=r"500 .*start_weight_update"):
            client.finish_weight_update("9")
    assert server.get("/weight_info") == version
    assert server.get("/v1/sharding_spec") == layout
    assert server.answers() == answers


def test_a_trainer_that_is_killed_leaves_a_server_that_answers(engine, server, trainers):
    before, version = server.answers(), server.get("/weight_info")
    request = Request(server, TOKENS)
    with door(server.client, str(engine.folder / "http")) as client:
        with plain_ranks(2) as mortal, pytest.raises(RuntimeError, match="rank 1: died"):
            mortal.run(dies, client, engine.folder, 1)
        assert request.result() == (TOKENS, "length")
        assert server.answers() == before
        assert server.get("/weight_info") == version
        trainers.run(dense_there_and_back, client, engine.folder)
    assert server.answers() == engine.fresh


class DyingClient(HTTPClient):
    """Kills the trainer when everything but finish_weight_update has been said."""

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def dies_in_its_commit(rank: int, world: int, url: str, folder: Path) -> None:
    held = load_file(folder / "b" / "model.safetensors")
    Trainer(held, DyingClient(url), options=Options(seconds=60)).send()


def test_a_trainer_that_is_killed_in_its_commit_leaves_a_server_that_goes_on(engine, server, trainers):
    before = server.answers()
    with plain_ranks(1) as mortal, pytest.raises(RuntimeError, match="rank 0: died"):
        mortal.run(dies_in_its_commit, server.url, engine.folder)
    assert server.get("/is_paused") == {"is_paused": False}
    assert server.answers() == before
    with door(server.client, str(engine.folder / "http")) as client:
        trainers.run(dense_there_and_back, client, engine.folder)  # and closes the session
    assert server.answers() == engine.fresh
