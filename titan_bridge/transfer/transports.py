"""How tensors get from a trainer rank to a worker: over the connection itself, or beside it.

    tcp      the authenticated connection, through both hosts' memory; always possible
    memory   a ring in memory that the two processes share: the host's on CPUs, the GPU's (CUDA IPC) where both use one
    nccl     a process group of the two, from GPU to GPU; gloo is the same on CPUs

The trainer rank offers, best first; the worker takes the first that it can, and logs which. A group is made for one
connection and ends with it: a fault costs the group, not the engine. Groups meet over the connection, but what they
send afterwards is not authenticated, as with any use of NCCL and gloo. Nothing here has run on a GPU.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import threading
from collections.abc import Generator, Mapping, Sequence
from datetime import timedelta
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from titan_bridge.cpu import variables
from titan_bridge.memory import bytes_of
from titan_bridge.transfer.errors import PeerLost, TransferError
from titan_bridge.transfer.wire import Connection, Deadline

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM's handlers, without importing it

SLOT_BYTES, SLOTS = 2**20, 4
"""Of a ring: small, so that what one process writes is still in the processor's cache when the other reads it."""
RING_BYTES = SLOTS * SLOT_BYTES
KEY_BYTES = 32  # at the ring's beginning until it is used: that both ends have mapped one memory
_ENVIRONMENT = threading.Lock()
_SURVIVE = {
    "TORCH_NCCL_BLOCKING_WAIT": "1",  # `wait` raises after its time, in the thread that waits
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",  # nobody ends the process for a peer that is gone
    "TORCH_NCCL_ENABLE_MONITORING": "0",
}
"""Environment that a NCCL group reads when it is made."""


class Tcp:
    """The connection itself. All transports take contiguous tensors, and raise PeerLost after the deadline."""

    name: ClassVar[str] = "tcp"

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.device = torch.device("cpu")  # where what is sent should lie

    def send(self, data: torch.Tensor, deadline: Deadline) -> None:
        self.connection.send_raw(bytes_of(data), deadline)

    def head(self, deadline: Deadline) -> dict[str, Any]:
        """What the trainer rank says before it sends tensors."""
        return self.connection.receive(deadline)

    def receive(self, into: torch.Tensor, deadline: Deadline) -> None:
        """Fill a tensor in the host's memory."""
        self.connection.receive_raw(bytes_of(into), deadline)

    def finish(self, deadline: Deadline) -> None:
        """Wait until the receiver has emptied every slot; the sender's tensors may change after this."""

    def close(self) -> None:
        """Whoever waits on either end fails, at the latest after its deadline."""
        self.connection.close()


class Memory(Tcp):
    """A ring of slots that both processes have; over the connection goes one byte for each that was filled or
    emptied: their number, so that anything else is noticed."""

    name = "memory"

    def __init__(self, connection: Connection, ring: torch.Tensor) -> None:
        super().__init__(connection)
        self.device = ring.device
        self._slots: torch.Tensor | None = ring.view(SLOTS, SLOT_BYTES)
        self._told = self._heard = 0
        """Slots that this end has filled or emptied, and that the other end has, modulo 256."""

    def send(self, data: torch.Tensor, deadline: Deadline) -> None:
        for part in data.view(-1).view(torch.uint8).split(SLOT_BYTES):
            if (self._told - self._heard) % 256 == SLOTS:
                self._hear(deadline)
            self._slot(len(part)).copy_(part)
            self._tell(deadline)

    def receive(self, into: torch.Tensor, deadline: Deadline) -> None:
        for part in into.view(-1).view(torch.uint8).split(SLOT_BYTES):
            self._hear(deadline)
            part.copy_(self._slot(len(part)))
            self._tell(deadline)

    def finish(self, deadline: Deadline) -> None:
        while self._heard != self._told:
            self._hear(deadline)

    def close(self) -> None:
        super().close()
        self._slots = None  # now: the error that ended it may keep this object until Python looks for cycles

    def _slot(self, size: int) -> torch.Tensor:
        if (slots := self._slots) is None:
            raise PeerLost(f"the connection with {self.connection.peer} is gone")
        return slots[self._told % SLOTS, :size]

    def _tell(self, deadline: Deadline) -> None:
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        self._told = (self._told + 1) % 256
        self.connection.send_raw(bytes([self._told]), deadline)

    def _hear(self, deadline: Deadline) -> None:
        self._heard = (self._heard + 1) % 256
        self.connection.receive_raw(byte := bytearray(1), deadline)
        if byte[0] != self._heard:
            raise TransferError(f"{self.connection.peer} is out of step")


class Group(Tcp):
    """A process group of the two: NCCL where both have a GPU, each its own; else gloo."""

    def __init__(self, connection: Connection, name: str, rank: int, device: torch.device, limit: Deadline):
        super().__init__(connection)
        self.name, self.device, self._other = name, device, 1 - rank  # type: ignore[misc]
        self._store = store = _Store(connection, limit)
        try:
            if name == "nccl":
                options = dist.ProcessGroupNCCL.Options()
                options._timeout = timedelta(days=1)  # ours are those of each `wait`
                with _ENVIRONMENT, variables(_SURVIVE):
                    self._group: Any = dist.ProcessGroupNCCL(store, rank, 2, options)
            else:  # waits for the other end, so under no lock: two and two could wait for each other
                options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
                options._devices = [dist.ProcessGroupGloo.create_device(hostname=connection.host)]  # type: ignore[attr-defined]
                options._timeout = timedelta(seconds=limit.left)
                self._group = dist.ProcessGroupGloo(store, rank, 2, options)
            # NCCL connects only now: where that cannot be, no weight was sent yet.
            (self.receive if rank else self.send)(torch.zeros(1, dtype=torch.uint8), limit)
        except RuntimeError as error:  # PeerLost is one
            first = (str(error).splitlines() or [""])[0]
            without = 'Options(transport="tcp") needs none'
            raise PeerLost(f"no {name} group with {connection.peer}: {first}; {without}") from None

    def head(self, deadline: Deadline) -> dict[str, Any]:
        while "key" in (told := super().head(deadline)):
            self._store.know(told)
        return told

    def send(self, data: torch.Tensor, deadline: Deadline) -> None:
        self._do(self._group.send, data.view(-1).view(torch.uint8).to(self.device), deadline)

    def receive(self, into: torch.Tensor, deadline: Deadline) -> None:
        there = into if into.device == self.device else torch.empty_like(into, device=self.device)
        self._do(self._group.recv, there.view(-1).view(torch.uint8), deadline)
        if there is not into:
            into.copy_(there)

    def _do(self, what: Any, data: torch.Tensor, deadline: Deadline) -> None:
        try:
            what([data], self._other, 0).wait(timedelta(seconds=deadline.left))
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()
        except RuntimeError as error:  # DistBackendError is one
            first = str(error).splitlines()[0]
            raise PeerLost(f"{self.connection.peer} over {self.name}: {first}") from None

    def close(self) -> None:
        super().close()
        self._group.abort()


class _Store(dist.Store):
    """What two processes tell each other while they make a group, over their connection."""

    def __init__(self, connection: Connection, limit: Deadline) -> None:
        super().__init__()
        self._connection, self._limit, self._known = connection, limit, dict[str, bytes]()

    def set(self, key: str, value: str | bytes) -> None:
        self._known[key] = value.encode() if isinstance(value, str) else value
        self._connection.send({"key": key, "value": self._known[key].hex()}, self._limit)

    def get(self, key: str) -> bytes:
        while key not in self._known:
            self.know(self._connection.receive(self._limit))
        return self._known[key]

    def know(self, told: Mapping[str, Any]) -> None:
        """What the other process has set."""
        self._known[told["key"]] = bytes.fromhex(told["value"])

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        for key in keys:
            self.get(key)

    def check(self, keys: Sequence[str]) -> bool:
        return all(key in self._known for key in keys)


def offer(connection: Connection, transport: str, device: torch.device, limit: Deadline) -> Tcp:
    """The trainer rank's end, for `Options.transport` and tensors on `device`. TransferError where it takes none."""
    names, refused, ring, handle = [transport], list[str](), None, dict[str, Any]()
    if transport == "auto":
        names = ["memory", "nccl", "tcp"] if device.type == "cuda" else ["memory", "tcp"]
    with contextlib.ExitStack() as held:
        if "memory" in names:
            try:
                ring, handle = held.enter_context(_shared(device))
            except (
                OSError,
                RuntimeError,
                AttributeError,
            ) as error:  # the last one: a system without memfd_create
                names.remove("memory")
                refused.append(f"memory: {error}")
        said = {"offer": names, "refused": refused, "device": _name_of(device), "memory": handle}
        connection.send(said, limit)
        answer = connection.receive(limit)
    if answer.get("error"):
        raise TransferError(answer["error"])
    if answer["take"] == "memory" and ring is not None:
        return Memory(connection, ring)
    return Tcp(connection) if answer["take"] == "tcp" else Group(connection, answer["take"], 0, device, limit)


def accept(connection: Connection, device: torch.device, limit: Deadline) -> Tcp:
    """The worker's end. Raises TransferError where it can take none of what is offered."""
    told = connection.receive(limit)
    theirs, ring, refused = told["device"], None, list(told.get("refused", ()))
    for name in told["offer"]:
        try:
            if name == "memory":
                ring = _opened(told["memory"], theirs, device)
            elif name == "nccl" and {theirs.split()[0], device.type} != {"cuda"}:
                raise ValueError(f"the trainer's tensors are on {theirs}, the engine's on {device}")
            elif name == "nccl" and theirs == _name_of(device):
                raise ValueError("both use one GPU")
            elif name == "gloo" and theirs != "cpu":
                raise ValueError("the trainer's tensors are not on a CPU")
        except (OSError, ValueError, RuntimeError) as error:
            refused.append(f"{name}: {error}")
            continue
        connection.send({"take": name}, limit)
        why = f" ({'; '.join(refused)})" if refused else ""
        logger.info("weight transfer: tensors of %s come over %s%s", connection.peer, name, why)
        if ring is not None:
            return Memory(connection, ring)
        return Tcp(connection) if name == "tcp" else Group(connection, name, 1, device, limit)
    text = f"no transport to {connection.peer}: {'; '.join(refused)}; Options.transport may be 'auto'"
    connection.send({"error": text}, limit)
    raise TransferError(text)


def _name_of(device: torch.device) -> str:
    return f"cuda {torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else device.type


@contextlib.contextmanager
def _shared(device: torch.device) -> Generator[tuple[torch.Tensor, dict[str, Any]]]:
    """A new ring, and how another process finds it meanwhile."""
    if device.type == "cuda":
        ring = torch.empty(RING_BYTES, dtype=torch.uint8, device=device)
        parts = ring.untyped_storage()._share_cuda_()
        yield ring, {"cuda": [part.hex() if isinstance(part, bytes) else part for part in parts]}
        return
    # Memory without a name: whoever is killed at whatever moment leaves none behind.
    with open(os.memfd_create("titan-transfer", os.MFD_CLOEXEC), "r+b") as file:
        file.truncate(RING_BYTES)
        path, key = f"/proc/{os.getpid()}/fd/{file.fileno()}", secrets.token_bytes(KEY_BYTES)
        ring = _mapped(path)
        ring[:KEY_BYTES] = torch.tensor(list(key), dtype=torch.uint8)
        yield ring, {"path": path, "key": key.hex()}


def _opened(handle: Mapping[str, Any], theirs: str, device: torch.device) -> torch.Tensor:
    """A trainer rank's ring. Raises OSError or ValueError where it cannot be reached from this process."""
    if "cuda" in handle:
        if theirs != _name_of(device):
            raise ValueError("not on one GPU")
        # The first part is the number that the GPU has among those of the other process.
        parts = [bytes.fromhex(part) if isinstance(part, str) else part for part in handle["cuda"]]
        storage = torch.UntypedStorage._new_shared_cuda(_number(device), *parts[1:])  # type: ignore[attr-defined]
        return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
    if device.type != "cpu":
        raise ValueError("the trainer's tensors are on CPUs, the engine's are not")
    # The size first: to map a file makes it as large as that.
    if os.stat(handle["path"]).st_size != RING_BYTES:
        raise ValueError("not on one host")
    ring = _mapped(handle["path"])
    if bytes(ring[:KEY_BYTES].tolist()).hex() != handle["key"]:
        raise ValueError("not on one host")
    return ring


def _number(device: torch.device) -> int:
    """Of a GPU, among those that this process sees."""
    return torch.cuda.current_device() if device.index is None else device.index


def _mapped(path: str) -> torch.Tensor:
    # Not mmap.mmap, which keeps a descriptor open for each mapping.
    return torch.from_file(path, shared=True, size=RING_BYTES, dtype=torch.uint8)
