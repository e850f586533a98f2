"""One run: its options, what was decided for it, and how it is carried out."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from titan_bridge.checkpoint import hf
from titan_bridge.checkpoint.checkpoint import Checkpoint
from titan_bridge.checkpoint.dcp import METADATA, write_metadata
from titan_bridge.checkpoint.execute import WORKER_BYTES, Executor, Progress
from titan_bridge.checkpoint.files import size_of
from titan_bridge.checkpoint.mapping import TensorMap
from titan_bridge.checkpoint.open import open_checkpoint
from titan_bridge.checkpoint.staging import FileResult, Staging, disk_error, existing
from titan_bridge.checkpoint.target import OutFile, Target
from titan_bridge.checkpoint.team import Team
from titan_bridge.checkpoint.verify import check_source, is_as_written
from titan_bridge.errors import BridgeError
from titan_bridge.sharding.layout import dtype_name
from titan_bridge.sharding.plan import Plan

_SMALL = 64 << 20  # bytes allowed for plans and headers when the memory is estimated


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to do. Sizes are in bytes."""

    source: Path
    target: Path
    to: Literal["hf", "dcp"]
    config: Path | None = None
    """A directory with config.json, the file, or "FAMILY:FLAVOR" of TorchTitan; else the source's own."""
    dtype: torch.dtype | None = None  # of floating-point weights; else they keep their own
    names: str | None = None  # how the source calls tensor NAME, with `{}` in place of NAME; None: as we do
    max_shard_size: int = 5_000_000_000
    merge_lora: Path | None = None  # a LoRA adapter in PEFT's format whose products are added to the weights
    with_optimizer: bool = False
    workers: int = 2
    overwrite: bool = False
    resume: bool = False
    verify: bool = False
    fsync: bool = False


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run did."""

    files: tuple[str, ...]
    bytes_read: int
    bytes_written: int  # by this run; finished files of an earlier one (`--resume`) do not count
    resumed_parts: int
    source_checked: bool
    """Whether all that was read was held against the source's own checksums: under `verify`, where DCP has some."""
    nan: Mapping[str, int]  # NaNs by destination tensor, where there are any
    inf: Mapping[str, int]  # infinite elements
    overflow: Mapping[str, int]
    """Those of them that the cast to another dtype made infinite; all three in the order of the tensors."""
    lost: Mapping[str, int]
    """Source tensors that the destination has no place for: elements that were not zero."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run that was checked and can start."""

    options: Options
    source: Checkpoint
    tensors: TensorMap
    target: Target
    plan: Plan
    hf: Mapping[str, Any] | None
    carried: tuple[Path, ...]
    team: Team = field(default_factory=Team)

    @property
    def files(self) -> tuple[str, ...]:
        """Names of all files that will be there in the end."""
        return (*(file.name for file in self.target.files), *self._small_files())

    @property
    def bytes_to_read(self) -> int:
        """Bytes of weights (and carried entries) that are read, over all processes."""
        wanted = {item.source.name for group in self.plan.groups for item in group.items}
        return sum(self.source.tensor(name).nbytes for name in wanted)

    @property
    def memory(self) -> int:
        """Bytes that a process needs beside the interpreter and its imports: an estimate from above."""
        return self.options.workers * WORKER_BYTES + _SMALL

    def free(self) -> int:
        """Free bytes on the disk of the target."""
        return shutil.disk_usage(existing(Staging(self.options.target).path.parent)).free

    def digest(self) -> str:
        """The same for runs that write the same bytes from the same files."""
        paths = {chunk.path for entry in self.source.entries.values() for chunk in entry.chunks}
        if self.options.merge_lora is not None:
            paths |= set(self.options.merge_lora.iterdir())
        facts = {
            "source": [[str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns] for p in sorted(paths)],
            "files": [[f.name, f.size] for f in self.target.files],
            "tensors": [[t.name, t.shape, str(t.dtype)] for t in self.tensors.tensors],
            "config": self.hf,
            "names": self.options.names,
            "views": [repr(view) for view in self.tensors.views],
        }
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def run(self, advance: Callable[[str, int], None] = lambda what, count: None) -> Outcome:
        """Write, verify if asked to, and publish; `advance` is told ("check", "write" or "verify", bytes).
        Raises BridgeError: a full disk, a source that changes under the run, or whatever another process met."""
        options, team = self.options, self.team
        staging = Staging(options.target)
        checked = [False]
        try:
            if options.verify:
                checked = team.each(lambda: check_source(self.source, team, partial(advance, "check")))
            # Before hours of writing: these tensors are read for nothing else, and may be damaged.
            lost, before = team.first(self._lost), self.source.bytes_read
            team.first(lambda: self._begin(staging))
            found = team.first(staging.results)
            kept = team.each(lambda: self._kept(staging, found, partial(advance, "verify")))
            done = {name: result for own in kept for name, result in own.items()}
            mine = [file for file in self._share() if file.name not in done]
            new = team.each(Executor(self, staging, mine, partial(advance, "write")).run)
            found = done | {result.file: result for own in new for result in own}
            results = [found[file.name] for file in self.target.files]
            if options.verify:
                team.each(lambda: self._verify(staging, new[team.rank], partial(advance, "verify")))
            read = sum(team.each(lambda: self.source.bytes_read - before))
            team.first(lambda: self._publish(staging, results))
        except OSError as error:
            raise disk_error(error, staging.path) from None
        finally:
            staging.close()
        return Outcome(
            files=self.files,
            bytes_read=read,
            bytes_written=sum(file.size for file in self.target.files if file.name not in done),
            resumed_parts=len(done),
            source_checked=all(checked),
            lost=lost,
            **{what: self._sums(results, what) for what in ("nan", "inf", "overflow")},
        )

    def _begin(self, staging: Staging) -> None:
        # What an interrupted run left is either reused or removed first.
        needed = self.target.nbytes - sum(f.stat().st_blocks * 512 for f in staging.path.glob("*"))
        if needed > (free := self.free()):
            raise BridgeError(
                f"the disk of {self.options.target} has {free / 1e9:.2f} GB free; {needed / 1e9:.2f} GB are needed: "
                "free some space or choose another disk"
            )
        staging.begin(self.digest(), resume=self.options.resume, fsync=self.options.fsync)
        staging.check(overwrite=self.options.overwrite)  # `begin` may have put back what was being replaced

    def _kept(
        self, staging: Staging, found: dict[str, FileResult], advance: Progress
    ) -> dict[str, FileResult]:
        """Of the files that an earlier run finished, those of this process that are as they were written."""
        kept = {}
        for file in [file for file in self._share() if file.name in found]:
            path, result = staging.path / file.name, found[file.name]
            there = path.is_file() and path.stat().st_size == file.size
            if there and is_as_written(path, result.crc, advance):
                kept[file.name] = result
        return kept

    def _verify(self, staging: Staging, results: Sequence[FileResult], advance: Progress) -> None:
        files = {staging.path / result.file: result.crc for result in results}
        bad = [path for path, crc in files.items() if not is_as_written(path, crc, advance)]
        for path in bad:
            path.unlink()  # so that it is not taken for finished
        if bad:
            what = "is not what was written; the disk or the memory is at fault. --resume writes again what is bad"
            raise BridgeError(f"{bad[0]} {what}")

    def _share(self) -> list[OutFile]:
        """The files of this process: the largest first to whoever has least, the same on all of them."""
        loads, owner = [0] * self.team.size, {}
        for file in sorted(self.target.files, key=lambda file: -file.size):
            owner[file.name] = rank = loads.index(min(loads))
            loads[rank] += file.size
        return [file for file in self.target.files if owner[file.name] == self.team.rank]

    def _sums(self, results: Iterable[FileResult], what: str) -> dict[str, int]:
        """Counts of all files together, in the order of the tensors."""
        total: Counter[str] = Counter()
        for result in results:
            total.update(result.counts[what])
        return {tensor.name: total[tensor.name] for tensor in self.tensors.tensors if total[tensor.name]}

    def _lost(self) -> dict[str, int]:
        """Elements other than zero in source tensors that have no place in the destination."""
        counts = {name: int(self.source.read(name).count_nonzero()) for name in self.tensors.dropped}
        return {name: count for name, count in counts.items() if count}

    def _small_files(self) -> dict[str, Callable[[Path], object]]:
        """Name to what writes it."""
        writers: dict[str, Callable[[Path], object]] = {}
        if self.options.to == "hf":
            index = {
                "metadata": {"total_size": sum(tensor.nbytes for tensor in self.tensors.tensors)},
                "weight_map": dict(sorted(self.target.weight_map.items())),
            }
            writers[hf.INDEX] = lambda path: path.write_text(json.dumps(index, indent=2) + "\n")
        if self.hf is not None:
            config = dict(self.hf)
            dtypes = {dtype_name(t.dtype) for t in self.tensors.tensors if t.name not in self.tensors.buffers}
            if len(dtypes) == 1:
                config["dtype"] = dtypes.pop()
                if "torch_dtype" in config:
                    config["torch_dtype"] = config["dtype"]
            writers["config.json"] = lambda path: path.write_text(json.dumps(config, indent=2) + "\n")
        for carried in self.carried:
            writers[carried.name] = lambda path, carried=carried: shutil.copyfile(carried, path)
        if self.options.to == "dcp":
            target, paths = self.target, self.source.paths
            writers[METADATA] = lambda path: write_metadata(path, target.archives, paths)
        return writers

    def _publish(self, staging: Staging, results: Sequence[FileResult]) -> None:
        for name, write in self._small_files().items():
            write(staging.path / name)
        for file in self.target.files:
            if (found := size_of(staging.path / file.name)) != file.size:
                raise BridgeError(f"{staging.path / file.name} has {found} bytes, {file.size} were written")
        with open_checkpoint(staging.path, extra=True) as written:
            for stated in self.tensors.tensors:
                found = written.tensor(stated.name)
                same = (found.shape, found.dtype) == (stated.shape, stated.dtype)
                assert same, f"{stated.name} was written as {found.dtype} {found.shape}"
        staging.publish(self.files, overwrite=self.options.overwrite, fsync=self.options.fsync)
