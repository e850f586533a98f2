"""Two nodes: one here, the other with a network, a /dev/shm and a temporary folder of its own.

Where namespaces cannot be made, the nodes are two loopback addresses of one machine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch

from tests.conftest import ROOT, descendants, kill
from titan_bridge import cli
from titan_bridge.ports import free_port
from titan_bridge.reference import load_reference
from titan_bridge.testing import make_checkpoint
from titan_bridge.transfer import Options, Trainer

pytestmark = [pytest.mark.engine, pytest.mark.timeout(280)]

START_SECONDS = 200
END_SECONDS = 60
PROMPT = [5, 9, 13, 200, 31]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """`addresses` and network `interfaces` of node 0 and node 1, and what runs the command after it on node 1."""

    addresses: tuple[str, str]
    interfaces: tuple[str, str]
    on_other: tuple[str, ...]


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    name = f"titan{os.getpid()}"
    zero, one = f"tb{os.getpid()}a", f"tb{os.getpid()}b"
    # A network for measurements of networks (RFC 2544), which no host is in.
    addresses = ("198.18.77.1", "198.18.77.2")
    steps = (
        f"netns add {name}",
        f"link add {zero} type veth peer name {one} netns {name}",
        f"addr add {addresses[0]}/30 dev {zero}",
        f"link set {zero} up",
        f"-n {name} addr add {addresses[1]}/30 dev {one}",
        f"-n {name} link set {one} up",
        f"-n {name} link set lo up",
    )
    try:
        if shutil.which("ip") and all(_ip(step) for step in steps):
            own_shm = ("sh", "-c", 'mount -t tmpfs tmpfs /dev/shm && exec "$@"', "sh")
            other = ("ip", "netns", "exec", name, *own_shm)
            yield Network(addresses=addresses, interfaces=(zero, one), on_other=other)
        else:
            yield Network(addresses=("127.0.0.1", "127.0.0.2"), interfaces=("lo", "lo"), on_other=())
    finally:
        if shutil.which("ip"):
            _ip(f"netns del {name}")
            _ip(f"link del {zero}")


def _ip(arguments: str) -> bool:
    return subprocess.run(["ip", *arguments.split()], capture_output=True, check=False).returncode == 0


class Nodes:
    """`titan-bridge serve` on both nodes, the second one headless; `logs` is what each has printed."""

    def __init__(self, network: Network, folder: Path, *arguments: str) -> None:
        self.folder = folder
        self.address = network.addresses[0]
        self.url = f"http://{self.address}:{(port := free_port())}"
        common = [
            sys.executable, "-m", "titan_bridge.cli", "serve", *arguments, "--dtype", "float32",
            "--max-model-len", "256", "--enforce-eager", "--nnodes", "2", "--master-addr", self.address,
            "--master-port", str(free_port()),
        ]  # fmt: skip
        own = (
            ["--host", self.address, "--port", str(port), "--node-rank", "0"],
            ["--headless", "--node-rank", "1"],
        )
        before = ((), network.on_other)
        self.processes: list[subprocess.Popen[bytes]] = []
        self.own_tmp = [tempfile.mkdtemp(prefix="tb") for _ in (0, 1)]  # short, since sockets lie in it
        for rank in (0, 1):
            environment = {
                "VLLM_HOST_IP": network.addresses[rank],
                "GLOO_SOCKET_IFNAME": network.interfaces[rank],
                "TMPDIR": self.own_tmp[rank],
                "VLLM_SERVER_DEV_MODE": "1",
            }
            with (folder / f"log{rank}").open("w") as log:
                started = subprocess.Popen(
                    [*before[rank], *common, *own[rank]],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    process_group=0,
                    env={**os.environ, **environment},
                    cwd=ROOT,
                )
                self.processes.append(started)

    @property
    def logs(self) -> tuple[str, str]:
        return (self.folder / "log0").read_text(), (self.folder / "log1").read_text()

    def wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            assert all(process.poll() is None for process in self.processes), self.logs
            assert time.monotonic() < deadline, self.logs
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health", timeout=2).status_code == 200:
                    return
            time.sleep(0.3)

    def answer(self, model: Path, prompt: list[int]) -> tuple[list[int], list[float]]:
        """Greedy tokens and their log-probabilities."""
        asked = {"model": str(model), "prompt": prompt, "max_tokens": 6, "temperature": 0, "logprobs": 0}
        asked |= {"return_token_ids": True, "ignore_eos": True}
        (choice,) = httpx.post(f"{self.url}/v1/completions", json=asked, timeout=60).json()["choices"]
        return choice["token_ids"], choice["logprobs"]["token_logprobs"]

    def kill(self, rank: int) -> tuple[int, float]:
        """End all processes of one node at once; the other's exit code, and the seconds until it ended."""
        started = time.monotonic()
        os.killpg(self.processes[rank].pid, signal.SIGKILL)
        code = self.processes[1 - rank].wait(END_SECONDS)
        return code, time.monotonic() - started

    def end(self) -> None:
        for process in self.processes:
            kill([*descendants(process.pid), process.pid])
            process.wait()
        for own in self.own_tmp:
            shutil.rmtree(own, ignore_errors=True)


@contextlib.contextmanager
def served(network: Network, folder: Path, *arguments: str) -> Iterator[Nodes]:
    nodes = Nodes(network, folder, *arguments)
    try:
        nodes.wait()
        yield nodes
    finally:
        nodes.end()


def expect(model: Path, prompt: list[int], tokens: list[int], logprobs: list[float]) -> None:
    """What TorchTitan's own forward says on one node."""
    expected_LV = load_reference(model).logprobs([*prompt, *tokens])
    rows = torch.arange(len(prompt) - 1, len(prompt) - 1 + len(tokens))
    assert tokens == expected_LV[rows].argmax(-1).tolist()
    assert torch.allclose(torch.tensor(logprobs), expected_LV[rows, torch.tensor(tokens)], atol=1e-5)


def test_tensor_parallel_over_two_nodes(network: Network, tmp_path: Path) -> None:
    a, b = (make_checkpoint(tmp_path / name, "qwen3", seed=seed) for seed, name in enumerate("ab"))
    options = (str(a), "--tp", "2", "--weight-transfer-config", '{"backend": "titan"}')
    with served(network, tmp_path, *options) as nodes:
        for rank, log in enumerate(nodes.logs):
            assert f"(Worker_TP{rank} " in log, log
            assert f"(Worker_TP{1 - rank} " not in log, log
            assert "Serving TorchTitan's Qwen3Model" in log
            assert "local_world_size=1," in log  # where vLLM binds workers to cores
        expect(a, PROMPT, *nodes.answer(a, PROMPT))

        with Trainer(load_reference(b).model, nodes.url, options=Options(seconds=60)) as trainer:
            report = trainer.send()
        assert len(report.received) == 2
        assert sum(report.received.values()) == report.lower_bound
        expect(b, PROMPT, *nodes.answer(a, PROMPT))

        code, seconds = nodes.kill(1)
        said = [line for line in nodes.logs[0].splitlines() if line.startswith("titan-bridge: ")]
        assert code == 1
        assert len(said) == 1
        assert said[0].startswith("titan-bridge: node 1 (")
        assert "has ended; this server cannot go on without it and ends" in said[0]
        assert seconds < END_SECONDS


def test_pipeline_stages_over_two_nodes(network: Network, tmp_path: Path) -> None:
    """One stage on each node, read from a DCP, an embedding that both have, and new weights for both."""
    a, b = (
        make_checkpoint(tmp_path / name, "qwen3", seed=seed, num_hidden_layers=3, tie_word_embeddings=True)
        for seed, name in enumerate("ab")
    )
    dcp = tmp_path / "dcp"
    assert cli.main(["reshard", str(a), str(dcp), "--to", "dcp"]) == 0
    options = (str(dcp), "--pp", "2", "--sharding-spec", "--weight-transfer-config", '{"backend": "titan"}')
    with served(network, tmp_path, *options) as nodes:
        for stage, log in enumerate(nodes.logs):
            assert f"(Worker_PP{stage} " in log, log
            assert f"(Worker_PP{1 - stage} " not in log, log
            assert f"stage {stage} with layers {2 * stage} to {1 + stage}, " in log
        expect(a, PROMPT, *nodes.answer(dcp, PROMPT))
        spec = httpx.get(f"{nodes.url}/v1/sharding_spec", timeout=60).json()
        assert {name: mesh["ranks"] for name, mesh in spec["meshes"].items()} == {
            "dense_pp0": [[[0]]], "dense_pp0_1": [[[[0]]], [[[1]]]], "dense_pp1": [[[1]]],
        }  # fmt: skip
        assert spec["params"]["tok_embeddings.weight"]["mesh"] == "dense_pp0_1"

        with Trainer(load_reference(b).model, nodes.url, options=Options(seconds=60)) as trainer:
            report = trainer.send()
            trainer.verify()
        assert sum(report.received.values()) == report.lower_bound
        expect(b, PROMPT, *nodes.answer(dcp, PROMPT))


def test_data_parallel_over_two_nodes(network: Network, tmp_path: Path, no_orphans: None) -> None:
    model = make_checkpoint(tmp_path / "moe", "qwen3_moe")
    options = (str(model), "--dp", "2", "--ep", "2", "--data-parallel-rpc-port", str(free_port()))
    with served(network, tmp_path, *options) as nodes:
        for last in range(4):
            prompt = [*PROMPT, last]
            expect(model, prompt, *nodes.answer(model, prompt))
        finished = [
            line
            for line in httpx.get(f"{nodes.url}/metrics").text.splitlines()
            if line.startswith("vllm:generation_tokens_total{")
        ]
        assert [float(line.rsplit(" ", 1)[1]) > 0 for line in finished] == [True, True], finished

        code, seconds = nodes.kill(0)
        said = [line for line in nodes.logs[1].splitlines() if line.startswith("titan-bridge: ")]
        assert (code, len(said)) == (1, 1)
        assert "node 0 (" in said[0]
        assert seconds < END_SECONDS
