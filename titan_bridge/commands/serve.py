"""`titan-bridge serve`: check what can be checked, then be vLLM's server."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from importlib import metadata

import tyro

from titan_bridge.commands.infer import (
    InferCommand,
    format_vllm_options,
    option_name,
    parse_vllm_options,
    split_options,
)
from titan_bridge.errors import BridgeError

SHUTDOWN_SECONDS = 15
"""For requests that run when the server is told to end. vLLM's 0 kills the engine, whose shared memory then leaks."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serve(InferCommand):
    """Serve a model over HTTP with `vllm serve --model-impl torchtitan`.

    Options that are not listed here go to `vllm serve` as they are; write MODEL first.

    Example: titan-bridge serve out/demo/qwen3_moe --tp 2 --ep 2 --port 8000 --enforce-eager
    """

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for every one."""
    port: int = 8000
    """Port to listen on."""
    sharding_spec: bool = False
    """Answer GET /v1/sharding_spec, too: where every parameter lives; and /v1/fingerprints for `titan-bridge
    fingerprint URL`."""
    dry_run: bool = False
    """Print the command and the variables that would be set, and stop."""
    vllm_options: tyro.conf.Suppress[tuple[str, ...]] = ()

    def run(self) -> int:
        passed = parse_vllm_options(self.vllm_options)
        # What the checks need, and what has a part of ours, is read; all else goes to vLLM as it was written.
        read = {
            name: value for name, value in passed.items() if name in ("additional_config", "hf_overrides")
        }
        config = self.resolve({f"vllm.{name}": value for name, value in read.items()}).config

        from titan_bridge import cpu
        from titan_bridge.checks import check, port_free
        from titan_bridge.engine.cpu import forking

        given, parallel = {**config.vllm, **passed}, config.parallel
        for name, least in (("nnodes", 1), ("node_rank", 0), ("data_parallel_size_local", 0)):
            value = given.get(name, least)
            if type(value) is not int or value < least:
                raise BridgeError(f"--{name.replace('_', '-')} {value}; give an integer of at least {least}")
        listens = not given.get("headless")
        if listens:
            port_free(self.host, self.port)
        nodes, dp_local = given.get("nnodes", 1), given.get("data_parallel_size_local")
        workers = cpu.local_workers(parallel.dp, parallel.workers, nnodes=nodes, dp_local=dp_local)
        if listens and workers < parallel.workers and given.get("node_rank", 0) > 0:
            raise BridgeError(
                f"node_rank={given['node_rank']} holds workers of another node's engine, and serves nothing itself; "
                "add --headless"
            )
        added = cpu.environment(workers, given=os.environ, options=given)
        if self.sharding_spec:
            added["VLLM_PLUGINS"] = _plugins(os.environ.get("VLLM_PLUGINS"))
        options = config.engine_options()
        options["data_parallel_size"] = parallel.dp
        if "shutdown_timeout" not in given:
            options["shutdown_timeout"] = SHUTDOWN_SECONDS
        if parallel.ep == 1:
            del options["enable_expert_parallel"]  # vLLM's default
        arguments = ["serve", options.pop("model"), *format_vllm_options(options)]
        if listens:
            arguments += ["--host", self.host, "--port", str(self.port)]
        for option in split_options(self.vllm_options):
            if option_name(option[0])[0] not in read:
                arguments += option
        if self.dry_run:
            check(config)
            command = [sys.executable, "-m", "titan_bridge.engine.run.server", *arguments]
            print(" ".join([*(f"{k}={shlex.quote(v)}" for k, v in added.items()), shlex.join(command)]))
            return 0
        from titan_bridge.engine.run.nodes import node, watch
        from titan_bridge.engine.run.offline import users_mistake

        # Interrupted, vLLM leaves the memory of a queue to Python's resource tracker, which removes it and warns.
        sys.warnoptions.append("ignore:resource_tracker:UserWarning")
        with cpu.variables(added), watch(node(given, parallel.dp)) as others:
            forking.start()  # it imports while this process does
            try:
                check(config)
                from titan_bridge.engine.run.server import main

                main(arguments)
                if not listens and not (others and others.lost):
                    raise RuntimeError("an engine or a worker of this node has ended; the log above says why")
            except (
                Exception,
                SystemExit,
            ) as error:  # SystemExit: how vLLM takes a signal without an HTTP server
                if others and others.lost:
                    pass  # said already
                elif mistake := users_mistake(error):
                    raise BridgeError(mistake) from error
                else:
                    raise
            finally:
                forking.stop()
        return 1 if others and others.lost and not others.stopped else 0


def _plugins(given: str | None) -> str:
    """`VLLM_PLUGINS` that names ours, which adds its route, and shuts nothing out that is on without it."""
    groups = ("general_plugins", "platform_plugins", "io_processor_plugins", "stat_logger_plugins")
    on = [point.name for group in groups for point in metadata.entry_points(group=f"vllm.{group}")]
    return ",".join(dict.fromkeys([*(on if given is None else given.split(",")), "titan_bridge"]))
