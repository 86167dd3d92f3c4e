"""A group of processes, and this one's place in it: how they are connected, and what they tell each other.

One process alone is a group of one, in which everything here does nothing; so nobody asks how many there are. Whoever starts several
(torchrun, accelerate, deepspeed, or `devices` in a recipe) says so in the environment, by the names that torch has for it.

What processes tell is JSON or safetensors: torch's own collectives of objects read pickles.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Self, TypeVar

from trimtab.core import errors
from trimtab.core.errors import ProcessesDiffer, ProcessLost
from trimtab.core.interrupts import default_signals
from trimtab.core.process import first_line, number_in_environment

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
WAIT = timedelta(hours=24)
"""How long one process may be busy with what the others wait for: the tokens of a large corpus, an evaluation, a certificate."""
STEP = timedelta(minutes=30)
"""How long one process may be behind the others within a step."""
START = timedelta(minutes=10)
"""How long one process may come after the others."""


class ProcessGroup:
    """A group of processes, and this one's place in it."""

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, local_size: int = 1) -> None:
        """
        Args:
            rank: Of this process, from 0.
            size: How many have been started.
            local_rank: Its number among those on this machine, of which there are `local_size`.
        """
        self.rank, self.started, self.local_rank, self.local_size = rank, size, local_rank, local_size
        self.equal_passes = False
        """Whether all must make the same number of passes, because the base model's shards are gathered in each."""
        self.told_to_stop = False
        """Whether one of them has been interrupted. Every exchange says so, and all hear of it in the same one."""
        self.waited = 0.0
        """Seconds in exchanges so far."""
        self.watched = False
        """Whether an error of one of them ends all, as those of a command; else they tell each other of it."""
        self.parted = False
        """Whether this process has lost the others."""
        self.store: Any = None
        """What they all can write to, and read, without each other's help."""
        self._interrupts: list[float] = []
        self._control: Any = None
        self._initialized = False
        """Whether torch's group is ours to end."""

    @classmethod
    def of_environment(cls) -> Self:
        size = number_in_environment("WORLD_SIZE", 1)
        if size == 1 or "RANK" not in os.environ:  # without it, the size is somebody else's: every launcher gives both
            return cls()
        local_size = number_in_environment(
            "LOCAL_WORLD_SIZE", number_in_environment("LOCAL_SIZE", 1)
        )  # the second name is DeepSpeed's
        return cls(number_in_environment("RANK", 0), size, number_in_environment("LOCAL_RANK", 0), local_size)

    @property
    def size(self) -> int:
        """How many are connected. Until a run connects those that have been started, each is alone: a script's training may be another
        library's."""
        return 1 if self._control is None else self.started

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.size == 1 or self.rank == 0

    @property
    def first_here(self) -> bool:
        """Whether this is the first process of its machine."""
        return self.size == 1 or self.local_rank == 0

    def connect(self) -> None:
        """Reach the store, once. Raises ProcessLost if whoever keeps it can't be reached within `START`."""
        if self.started == 1 or self.store is not None:
            return
        import torch.distributed as dist

        try:
            with default_signals():  # torch waits in C++, where Python hears of none
                self.store, _, _ = next(iter(dist.rendezvous("env://", self.rank, self.started, timeout=START)))
        except (RuntimeError, ValueError) as error:  # the latter of variables that are not there
            place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise ProcessLost(
                f"The {self.started} processes of this run have not all reached {place} ({first_line(error)})."
            ) from error

    def open(self) -> None:
        """Connect the processes, once. Raises ProcessLost."""
        if self.parted:
            raise ProcessLost(
                "The processes of this script have lost each other in an earlier run: start the script again. A run that was begun resumes."
            )
        if self.started == 1 or self._control is not None:
            return
        import torch.distributed as dist

        if not dist.is_initialized():  # else by whoever has connected them before us
            self._initialize()
        with self._waiting():
            self._control = dist.new_group(backend="gloo", timeout=WAIT)

    def _initialize(self) -> None:
        import torch
        import torch.distributed as dist

        self.connect()
        on_cuda = torch.cuda.is_available()
        if on_cuda:
            torch.cuda.set_device(self.local_rank % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
        with self._waiting():
            dist.init_process_group(backend, store=self.store, rank=self.rank, world_size=self.started, timeout=STEP)
        self._initialized = True

    def close(self) -> None:
        """Disconnect; those that still wait for this process raise ProcessLost."""
        if self._control is not None:
            import torch.distributed as dist

            control, self._control, self.store = self._control, None, None
            dist.destroy_process_group(None if self._initialized else control)

    # Exchanges

    def sum_(self, tensor: "Tensor", group: Any = None) -> None:
        """Replace a tensor by its sum over all processes, or a group of torch's, which is the same to the bit in all of them."""
        if self.size > 1:
            import torch.distributed as dist

            with self._waiting():
                dist.all_reduce(tensor, group=group)

    def from_first_(self, tensor: "Tensor") -> None:
        """Replace a tensor by that of the first process."""
        if self.size > 1:
            import torch.distributed as dist

            with self._waiting():
                dist.broadcast(tensor, 0)

    def tell(self, own: Any) -> list[Any]:
        """What each process says, as JSON data, in the order of their ranks. Floats arrive as they are."""
        if self.size == 1:
            return [own]
        return [json.loads(said) for said in self._exchange(json.dumps(own).encode())]

    def told_by_first(self, say: Callable[[], T]) -> T:
        """What the first process says, as JSON data; the others are not asked."""
        said: T = self.tell(say() if self.first else None)[0]
        return said

    def gather(self, own: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
        """Tensors on the host of all processes by their names, of which no two have the same."""
        if self.size == 1:
            return dict(own)
        from safetensors.torch import load, save

        found: dict[str, Tensor] = {}
        for said in self._exchange(save({name: tensor.detach().contiguous() for name, tensor in own.items()})):
            found |= load(said)
        return found

    def tensors_of_first(self, own: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
        """The first process's tensors by their names; they are on the host. The others' are left alone."""
        if self.size == 1:
            return dict(own)
        import torch

        forms: list[Any] = self.told_by_first(
            lambda: [[name, str(t.dtype).removeprefix("torch."), [*t.shape]] for name, t in own.items()]
        )
        found = {}
        for name, dtype, shape in forms:
            found[name] = own[name].contiguous() if self.first else torch.empty(shape, dtype=getattr(torch, dtype))
            self.from_first_(found[name])
        return found

    def wait(self) -> None:
        """Wait until all processes are here."""
        self.tell(None)

    def agree(self, what: str, fact: Any) -> None:
        """Raise ProcessesDiffer unless all processes have the same fact, as JSON data.

        Args:
            what: What the fact is, and what to do if it differs.
        """
        facts = self.tell(fact)
        if other := next((rank for rank, one in enumerate(facts) if one != facts[0]), None):
            raise ProcessesDiffer(f"Process {other} of {self.size} differs from process 0 in {what}")

    def _exchange(self, own: bytes) -> list[bytes]:
        """What each process says, in the order of their ranks. Raises the error that one of them has told instead (`failing_together`)."""
        said, failed = self._exchanged(own)
        if (rank := next((rank for rank, has_failed in enumerate(failed) if has_failed), None)) is not None:
            name, message = json.loads(said[rank])
            kind = getattr(errors, name, None)
            error = kind(message) if kind else ProcessLost(f"Process {rank} of {self.size} has failed: {name}: {message}")
            error.is_told = True
            raise error
        return said

    def _exchanged(self, own: bytes, *, failed: bool = False) -> tuple[list[bytes], list[bool]]:
        """What each process says, in the order of their ranks, and which of them tell of an error; and whether one has been interrupted."""
        import torch
        import torch.distributed as dist

        with self._waiting():
            head = torch.tensor([len(own), bool(self._interrupts), failed])
            heads = [torch.zeros_like(head) for _ in range(self.size)]
            dist.all_gather(heads, head, group=self._control)
            lengths = [int(of_one[0]) for of_one in heads]
            padded = torch.zeros(max(lengths), dtype=torch.uint8)
            if own:
                padded[: len(own)] = torch.frombuffer(bytearray(own), dtype=torch.uint8)
            said = [torch.zeros_like(padded) for _ in range(self.size)]
            if len(padded):
                dist.all_gather(said, padded, group=self._control)
        self.told_to_stop |= any(bool(of_one[1]) for of_one in heads)
        found = [one[:length].numpy().tobytes() for one, length in zip(said, lengths, strict=True)]
        return found, [bool(of_one[2]) for of_one in heads]

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        except RuntimeError as error:  # torch's, of every kind
            self.parted = True
            raise ProcessLost(
                f"Another process of this run has ended, or can't be reached ({first_line(error)}). The same command resumes the run."
            ) from error
        self.waited += time.perf_counter() - started
