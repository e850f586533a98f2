"""A model that another package brings: found by its entry point, shown, converted, and computed as it is meant."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest
import torch
from safetensors.torch import load_file

from tests import own_model
from titan_bridge.models import registry
from titan_bridge.testing import make_checkpoint

TARGET = "gated_model.family:FAMILY"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed package."""
    return own_model.install(tmp_path_factory.mktemp("own"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return own_model.make(tmp_path_factory.mktemp("own") / "model")


FORKS = """
import json, os, sys, traceback
import titan_bridge.checkpoint.reshard, titan_bridge.commands.inspect, titan_bridge.reference
for line in sys.stdin:
    code, arguments, path, files = json.loads(line)
    child = os.fork()
    if child == 0:
        sys.path[:0], sys.argv = path, ["-c", *arguments]
        os.environ["PYTHONPATH"] = os.pathsep.join(path)
        for number, file in enumerate(files, 1):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        status = 0
        try:
            exec(code, {"__name__": "__main__"})
        except SystemExit as end:
            status = end.code
        except BaseException:
            status = 1
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status or 0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Run(Protocol):
    def __call__(
        self, code: str, *arguments: object, path: tuple[Path, ...]
    ) -> subprocess.CompletedProcess[str]: ...


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """`run(code, *arguments, path=folders)`: an interpreter that finds the packages in the folders.

    It is forked from one that has imported titan_bridge, and asked it for nothing.
    """
    files = [tmp_path_factory.mktemp("run") / name for name in ("stdout", "stderr")]
    server = subprocess.Popen(
        [sys.executable, "-c", FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdin is not None
    assert server.stdout is not None

    def ask(code: str, *arguments: object, path: tuple[Path, ...]) -> subprocess.CompletedProcess[str]:
        asked = code, [*map(str, arguments)], [*map(str, (*path, own_model.SOURCE.parents[1]))]
        print(json.dumps([*asked, [*map(str, files)]]), file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess(code, status, *(file.read_text() for file in files))

    yield ask
    server.stdin.close()
    server.wait(30)
    server.stdout.close()


COMMANDS = """
import json, sys
from titan_bridge import cli
for arguments in json.loads(sys.argv[1]):
    if code := cli.main(arguments):
        sys.exit(code)
"""


def test_commands_find_it_by_its_entry_point(run: Run, site: Path, model: Path, tmp_path: Path) -> None:
    there, back = (str(tmp_path / name) for name in ("dcp", "hf"))
    commands = [
        ["inspect", str(model), "--tp", "2", "--json"],
        ["reshard", str(model), there, "--to", "dcp", "--json"],
        ["reshard", there, back, "--to", "hf", "--json"],
    ]
    done = run(COMMANDS, json.dumps(commands), path=(site,))
    assert done.returncode == 0, done.stderr
    params = json.loads(done.stdout.splitlines()[0])["params"]
    gate = params["layers.1.attention.gate.weight"]
    assert (gate["placements"], gate["shape"]) == (["R", "R", "S(0)"], [128, 96])
    assert params["tok_embeddings.weight"]["shape"] == [302, 96]

    given = own_model.weights(0)
    returned = load_file(next(Path(back).glob("*.safetensors")))
    assert returned.keys() == given.keys()
    assert [name for name in given if not torch.equal(returned[name], given[name])] == []
    assert json.loads((Path(back) / "config.json").read_text())["model_type"] == "gated"


FORWARD = """
import sys
import torch
from tests import own_model
from titan_bridge.models import family_for, family_of, load_hf_config
from titan_bridge.reference import load_reference

reference = load_reference(sys.argv[1])
ids = torch.randint(301, (70,), generator=torch.Generator().manual_seed(1)).tolist()
expected = own_model.logprobs(own_model.weights(0), ids)
print((reference.logprobs(ids) - expected).abs().max().item(), expected.std().item())

hf = load_hf_config(sys.argv[1])
family = family_for(hf)
config = family.model_config(hf)
assert family_of(config) is family
again = family.hf_config(config, dtype="float32")
assert family.hf_config(family.model_config(again), dtype="float32") == again
assert {name for name in own_model.CONFIG if again.get(name) != hf[name]} == {"rope_theta"}, again
assert again["rope_parameters"]["rope_theta"] == hf["rope_theta"]  # the newer spelling
"""


def test_the_reference_computes_gated_attention(run: Run, site: Path, model: Path) -> None:
    done = run(FORWARD, model, path=(site,))
    assert done.returncode == 0, done.stderr
    difference, spread = map(float, done.stdout.split())
    print(f"max |difference| of log-probabilities: {difference:.1e}, standard deviation {spread:.1f}")
    assert difference < 2e-5
    assert spread > 0.5


TOML = """
[model]
family = "gated"
flavor = "tiny"
[data]
tokenizer = "bytes"
[trainer]
activation_checkpoint = "none"
training = { steps = 2, seq_len = 64, local_batch_size = 4 }
lr_scheduler.warmup_steps = 0
"""
TRAINED = """
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol
import torch
from safetensors.torch import load_file
from tests import own_model
from titan_bridge.reference import load_reference

run, hf = map(Path, sys.argv[1:])
(file,) = hf.glob("*.safetensors")
ids = torch.randint(256, (70,), generator=torch.Generator().manual_seed(1)).tolist()
expected = own_model.logprobs(load_file(file), ids)
print((load_reference(run).logprobs(ids) - expected).abs().max().item(), expected.std().item())
"""


def test_it_is_trained_by_a_flavor_that_also_reads_its_weights(run: Run, site: Path, tmp_path: Path) -> None:
    toml, out, bare, hf = (tmp_path / name for name in ("a.toml", "out", "bare", "hf"))
    toml.write_text(TOML)
    done = run(COMMANDS, json.dumps([["train", str(toml), "--out", str(out)]]), path=(site,))
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.copytree(out / "checkpoint/step-2", bare)  # without the config.json beside it
    convert = ["reshard", str(bare), str(hf), "--to", "hf", "--config", "gated:tiny", "--json"]
    done = run(COMMANDS, json.dumps([convert]), path=(site,))
    assert done.returncode == 0, done.stdout + done.stderr
    done = run(TRAINED, out, hf, path=(site,))
    assert done.returncode == 0, done.stderr
    difference, spread = map(float, done.stdout.split())
    assert difference < 2e-5
    assert spread > 0.05


REGISTER = """
import multiprocessing
from titan_bridge.models import families, register


def names():
    return [family.name for family in families()]


def child(pipe):
    pipe.send(names())


if __name__ == "__main__":
    before = names()
    register("gated_model.family:FAMILY")
    register("gated_model.family:FAMILY")  # a notebook's cell that runs again
    assert names() == [*before, "gated"], names()
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=child, args=(there,))
    process.start()
    assert here.recv() == names()
    process.join()
"""


def test_one_that_is_registered_is_known_here_and_in_a_spawned_process(tmp_path: Path) -> None:
    script = tmp_path / "notebook.py"
    script.write_text(REGISTER)
    environment = own_model.found_in(own_model.SOURCE)  # no entry point
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr


def test_one_that_is_registered_and_an_entry_point_is_one(run: Run, site: Path) -> None:
    code = f"""
from titan_bridge.models import families, register
before = families()
assert before[-1].name == "gated"
register({TARGET!r})
assert families() == before
"""
    done = run(code, path=(site,))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("no_such_module:FAMILY", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("json:FAMILY", "AttributeError: module 'json' has no attribute 'FAMILY'"),
        ("json:dumps", "it is a function, not a Family"),
        ("titan_bridge.models.qwen3:Qwen3", "it is a ABCMeta, not a Family"),
    ],
)
def test_what_is_no_family_is_not_registered(
    target: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(registry.REGISTERED, raising=False)
    with pytest.raises(ValueError) as refused:
        registry.register(target)
    assert str(refused.value) == f"{target!r} cannot be registered: {reason}"


HEAD = "from gated_model.family import Gated\n"
WRONG: dict[str, tuple[str, str]] = {
    "raises": ("raise OSError('no licence')", "OSError: no licence"),
    "none": ("FAMILY = 7", "it is a int, not a Family"),
    "half": (
        "from titan_bridge.models import Family\nclass Half(Family): pass\nFAMILY = Half()",
        "TypeError: Can't instantiate abstract class Half",
    ),
    "nameless": (
        HEAD + "class Nameless(Gated):\n    @property\n    def name(self): raise AttributeError\n"
        "FAMILY = Nameless()",
        "Nameless has no name",
    ),
    "taken": (
        HEAD + "class Mine(Gated):\n    name, architectures = 'qwen3', ('Mine',)\nFAMILY = Mine()",
        "its name 'qwen3' is taken by a family of titan_bridge",
    ),
}
"""What is wrong with a module of another package, and what is said of it."""
ALSO_WRONG = {
    "twin": HEAD
    + "class Twin(Gated): name, architectures = 'twin', ('Twin', 'LlamaForCausalLM')\nFAMILY = Twin()",
    "adapters": HEAD + "class Own(Gated):\n    name, architectures = 'own', ('Own',)\n"
    "    def adapters(self): raise ImportError('no kernels')\nFAMILY = Own()",
}

OTHERS = """
import json, sys
from titan_bridge.model_layout import layout
from titan_bridge.mesh import Sizes
from titan_bridge.models import UnsupportedModelError, family_for, load_hf_config

def said(name):
    try:
        return family_for({"architectures": [name]}).name
    except UnsupportedModelError as error:
        return str(error)

import contextlib, io
from titan_bridge import cli
said_by_doctor = io.StringIO()
with contextlib.redirect_stdout(said_by_doctor):
    cli.main(["doctor", "--json"])
findings = json.loads(said_by_doctor.getvalue())["findings"]

layouts = [len(layout(load_hf_config(path), Sizes(tp=2)).params) for path in sys.argv[1:]]
names = ("GatedForCausalLM", "Mine", "LlamaForCausalLM", "Unknown")
print(json.dumps([findings, layouts, *map(said, names)]))
"""


def test_packages_with_mistakes_are_named_and_stop_no_other(
    run: Run, site: Path, model: Path, tmp_path: Path
) -> None:
    codes = {name: code for name, (code, _) in WRONG.items()} | ALSO_WRONG
    (tmp_path / "two-1.0.dist-info").mkdir()
    points = "".join(f"{name} = wrong_{name}:FAMILY\n" for name in codes)
    (tmp_path / "two-1.0.dist-info/entry_points.txt").write_text(f"[{registry.GROUP}]\n{points}")
    (tmp_path / "two-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: two\nVersion: 1.0\n")
    for name, code in codes.items():
        (tmp_path / f"wrong_{name}.py").write_text(code)
    qwen3 = make_checkpoint(tmp_path / "qwen3", "qwen3", tokenizer=False)

    done = run(OTHERS, qwen3, model, path=(site, tmp_path))
    assert done.returncode == 0, done.stderr
    findings, layouts, gated, mine, llama, unknown = json.loads(done.stdout)
    assert all(layouts)
    assert gated == "gated"
    for name, (_, reason) in WRONG.items():
        point = f"entry point {name} = 'wrong_{name}:FAMILY' of two cannot be used: {reason}"
        assert point in unknown
        if name == "taken":
            assert mine == point
    assert llama == (
        "architecture LlamaForCausalLM is claimed twice: titan_bridge; "
        "entry point twin = 'wrong_twin:FAMILY' of two; remove one"
    )
    assert "adapters of family 'own' cannot be used: ImportError('no kernels')" in done.stderr

    told = {name: [found["value"] for found in findings if found["name"] == name] for name in
            ("family", "family gated", "family qwen3")}  # fmt: skip
    point = "entry point gated = 'gated_model.family:FAMILY' of gated-model"
    assert told["family gated"] == [f"GatedForCausalLM, from {point}"]
    assert told["family qwen3"] == ["Qwen3ForCausalLM, Qwen3MoeForCausalLM, from titan_bridge"]
    reasons = {name: reason for name, (_, reason) in WRONG.items()} | {
        "adapters": "adapters() fails: ImportError: no kernels"
    }
    for name, reason in reasons.items():
        start = f"entry point {name} = 'wrong_{name}:FAMILY' of two cannot be used: {reason}"
        assert [value for value in told["family"] if value.startswith(start)], name
    assert llama.removesuffix("; remove one") in told["family"]
    assert len(told["family"]) == len(reasons) + 1
