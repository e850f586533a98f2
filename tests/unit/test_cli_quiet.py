"""What is shown while an engine works, and what its log is searched for."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time

import pytest

from titan_bridge.commands import quiet as quiet_module
from titan_bridge.commands.quiet import last_error, quiet, user_error
from titan_bridge.errors import BridgeError


def test_quiet_keeps_noise_of_children_out_and_finds_the_users_mistake_in_it(capfd, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with quiet() as say:
        say("working")
        subprocess.run([sys.executable, "-c", "import sys; print('noise'); print('more', file=sys.stderr)"])
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "noise" not in captured.err
    assert "more" not in captured.err
    with pytest.raises(BridgeError, match=r"^ep=3 does not divide$"), quiet():
        os.write(1, b"(Worker pid=1) titan_bridge.errors.BridgeError: ep=3 does not divide\n")
        raise RuntimeError("Engine core initialization failed. See root cause above.")
    with pytest.raises(BridgeError, match=r"^mine$"), quiet():
        raise RuntimeError("outer") from BridgeError("mine")
    with pytest.raises(RuntimeError, match=r"OSError: no space \(log: .*\.log\)"), quiet():
        os.write(2, b"(EngineCore pid=1) ERROR 01-01 [core.py:1] OSError: no space\n")
        raise RuntimeError("Engine core initialization failed. See root cause above.")
    (log,) = tmp_path.iterdir()  # only the failure that it could not explain keeps its log
    assert "OSError: no space" in log.read_text()


def test_the_progress_line_follows_the_log(capfd):
    with quiet() as say:
        say("importing vLLM")
        for line in (*quiet_module.STAGES, "noise"):
            os.write(1, f"(EngineCore pid=1) INFO 01-01 [core.py:1] {line} of x\n".encode())
            time.sleep(0.4)
    told = [f"titan-bridge: {what}\n" for what in ("importing vLLM", *quiet_module.STAGES.values())]
    assert capfd.readouterr().err == "".join(told)


ENDS = """
import os, signal, sys
from titan_bridge.commands.quiet import quiet
with quiet() as say:
    print("noise", flush=True)
    END
"""


@pytest.mark.parametrize(
    "end", ["os.kill(os.getpid(), signal.SIGKILL)", "sys.exit(3)", "raise KeyboardInterrupt"]
)
def test_no_log_is_left_whichever_way_a_command_ends(end, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", ENDS.replace("END", end)],
        env={**os.environ, "TMPDIR": str(tmp_path)}, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert list(tmp_path.iterdir()) == []


def test_reasons_in_vllms_log():
    assert (
        user_error("1 validation error for VllmConfig\n  Value error, tp=3 is\n bad [type=value_error, i")
        == "tp=3 is bad"
    )
    assert user_error("nothing") is None
    assert (
        last_error("(EngineCore pid=3) ERROR 11-21 02:00:00 [core.py:9] ValueError: no room\nx")
        == "ValueError: no room"
    )
    assert last_error("nothing") is None
