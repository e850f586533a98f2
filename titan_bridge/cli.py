"""The console script `titan-bridge`.

A command is one file in `titan_bridge/commands/` with a frozen dataclass that has `run() -> int`, and one line in
`COMMANDS`. Only the module of the command that was asked for is imported, and what is heavy (torch, vllm,
torchtitan, pydantic) only inside its `run()`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gc
import importlib
import inspect
import io
import itertools
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from titan_bridge import __version__
from titan_bridge.errors import BridgeError, did_you_mean

COMMANDS = {
    "doctor": "titan_bridge.commands.doctor:Doctor",
    "generate": "titan_bridge.commands.generate:Generate",
    "serve": "titan_bridge.commands.serve:Serve",
    "parity": "titan_bridge.commands.parity:Parity",
    "inspect": "titan_bridge.commands.inspect:Inspect",
    "train": "titan_bridge.commands.train:Train",
    "plan": "titan_bridge.commands.plan:PlanCommand",
    "reshard": "titan_bridge.commands.reshard:Reshard",
    "diff": "titan_bridge.commands.diff:Diff",
    "fingerprint": "titan_bridge.commands.fingerprint:Fingerprint",
    "config": "titan_bridge.commands.config:Config",
}
"""Name -> "module:class". A class with a field `vllm_options` takes the options that it does not know."""

DEBUG = "TITAN_BRIDGE_DEBUG"

USER_ERROR = 2
INTERRUPTED = 130


def script(argv: Sequence[str] | None = None) -> int:
    """`main` in a process that ends with it."""
    try:
        return main(argv)
    finally:
        leave()


def leave() -> None:
    """Have what is alive left to the kernel when the process ends, not collected first: 0.4 s with torch."""
    if "triton" in sys.modules:  # it prints what was never collected, pages of it
        gc.unfreeze()  # what vLLM's server has frozen
    else:
        gc.freeze()


@contextlib.contextmanager
def imports() -> Iterator[None]:
    """What a command imports inside is never looked through for garbage: with torch, half a million objects.
    In a process that has torch already, what is alive is somebody else's, and stays as it is."""
    ours = "torch" not in sys.modules
    gc.disable()
    try:
        yield
    finally:
        if ours:
            gc.freeze()
        gc.enable()


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 if all is well; 1 if the command found a problem or failed; 2 for what the user can put right
        (one line on stderr); 130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # `titan-bridge ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        said = users_mistake(error)
        if os.environ.get(DEBUG) and not isinstance(error, BridgeError):
            raise
        if said is not None:
            print(f"titan-bridge: {_one_line(said)}", file=sys.stderr)
            return USER_ERROR
        print(
            f"titan-bridge: {type(error).__name__}: {_one_line(str(error))} ({DEBUG}=1 shows the traceback)",
            file=sys.stderr,
        )
        return 1


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"titan-bridge {__version__}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        guess = did_you_mean(name, COMMANDS)
        raise BridgeError(f"unknown command {name!r}; {guess}allowed: {', '.join(COMMANDS)}")
    return _parse(name, rest).run()


def _parse(name: str, arguments: list[str]) -> Any:
    import tyro  # a tenth of a second that --version and the overview do without

    module, class_name = COMMANDS[name].split(":")
    command = getattr(importlib.import_module(module), class_name)
    takes_options = any(field.name == "vllm_options" for field in dataclasses.fields(command))
    own, passed = arguments, []
    if takes_options and "--" in arguments:
        cut = arguments.index("--")
        own, passed = arguments[:cut], arguments[cut + 1 :]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed = tyro.cli(
                command,
                args=list(_with_numbers(own)),
                prog=f"titan-bridge {name}",
                description=inspect.cleandoc(command.__doc__ or ""),
                return_unknown_args=takes_options,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as end:
        if not end.code:  # --help
            raise
        raise BridgeError(f"{_usage_error(said.getvalue())}; see titan-bridge {name} --help") from None
    if not takes_options:
        return parsed
    parsed, unknown = parsed
    return dataclasses.replace(parsed, vllm_options=(*unknown, *passed))


def _usage_error(box: str) -> str:
    """What tyro says in a box of several lines, in one: between the title and a rule. The box is of ASCII where the
    screen is."""
    lines = [line.strip("│ ") and line.strip("│").rstrip("│ ") for line in box.splitlines()[1:]]
    rule = re.compile(r"\s*[-─╰╯]{8,}\s*").fullmatch
    lines = list(itertools.dropwhile(lambda line: not line.strip() or rule(line), lines))
    lines = list(itertools.takewhile(lambda line: not rule(line), lines))
    if lines and lines[0].strip().startswith("Missing from"):
        # Under each, further in, stands its help.
        indent = min((len(line) - len(line.lstrip()) for line in lines[1:] if line.strip()), default=0)
        names = [line.strip() for line in lines[1:] if line[indent : indent + 1].strip()]
        return f"missing: {', '.join(names)}"
    text = " ".join(" ".join(lines).split())
    if wrong := re.match(r"Error parsing (\S+): .*?['\"](.*?)['\"]", text):
        option = next((n for n in reversed(wrong[1].split("/")) if n.startswith("--")), wrong[1])
        given = re.search(r"from \[['\"](.*?)['\"]\]", text) or re.search(r": ['\"]([^'\"]*)['\"]$", text)
        kind = "integer" if "int()" in text else "number"
        return f"{option} {given[1] if given else wrong[2]} is no {kind}"
    return text[:1].lower() + text[1:].rstrip(".")


def _with_numbers(arguments: Sequence[str]) -> Iterator[str]:
    """The arguments, with `--attention-dp` given the value "true" where no number follows it."""
    for at, argument in enumerate(arguments):
        yield argument
        number = arguments[at + 1] if at + 1 < len(arguments) else ""
        if (
            argument in ("--attention-dp", "--attention_dp")
            and not number.lstrip("-").isdecimal()
            and number not in ("true", "false")
        ):
            yield "true"


def _overview() -> str:
    lines = [
        "titan-bridge: serve TorchTitan models in vLLM, and move their weights with one description of the sharding.",
        "",
        "usage: titan-bridge COMMAND [--help] ...",
        "",
    ]
    for name, target in COMMANDS.items():
        module, class_name = target.split(":")
        doc = getattr(importlib.import_module(module), class_name).__doc__ or ""
        lines.append(f"  {name:<13}{doc.strip().splitlines()[0]}")
    return "\n".join([*lines, "", "example: titan-bridge generate configs/infer/qwen3_moe_tp2_ep2.toml"])


_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Errors that the system reports without the name of a file."""
_OF_PYTHON = {
    "embedded null": "a name holds a NUL character",
    "integer string conversion": "a number is too long",
}
"""What Python says of a value that a user gave, and what it means."""


def users_mistake(error: Exception) -> str | None:
    """What is said to the user of an error that he can put right; None for any other."""
    text = str(error)
    if isinstance(error, BridgeError):
        return text
    if isinstance(error, OSError) and (error.filename is not None or error.errno in _OF_THE_DISK):
        return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    if isinstance(error, RecursionError):
        return f"a file or a value is nested too deeply ({text})"
    if isinstance(error, MemoryError):
        return f"not enough memory{f' ({text})' if text else ''}; free some, or choose smaller sizes"
    if isinstance(error, ValueError):
        return next((f"{what} ({text})" for sign, what in _OF_PYTHON.items() if sign in text), None)
    return None


def _one_line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    sys.exit(script())
