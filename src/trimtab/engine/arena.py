"""Where that lies which a forward pass makes: what it keeps for the backward pass, and what it needs for a moment.

malloc would find room for both, but the second leaves holes between the first, into which no aligned block of the same size
fits (glibc before 2.38): up to a third of a step's memory.
"""

import threading
from contextlib import AbstractContextManager
from contextvars import ContextVar

import torch
from torch import Tensor

from trimtab.core.attention_hook import holding

LINE = 64
"""Bytes; every tensor starts at a multiple of it."""


class ActivationArena:
    """One block of memory, used from its start again by each pack, one pack after the other."""

    def __init__(self, size: float) -> None:
        """
        Args:
            size: Bytes that the largest pack keeps. Those that none writes are never taken from the system.
        """
        self.bytes = torch.empty(int(size), dtype=torch.uint8)
        self.used = 0

    def again(self) -> AbstractContextManager[None]:
        """A forward pass in this thread, within the block, keeps what it keeps here, over what the last one kept: that one is done."""
        self.used = 0
        return holding(_kept, self)

    def take(self, like: Tensor, rows: int, columns: int) -> Tensor:
        start, self.used = self.used, self.used + -(-rows * columns * like.element_size() // LINE) * LINE
        if not like.is_cpu or self.used > len(self.bytes):
            return like.new_empty(rows, columns)
        # No view of the block: each of its tensors counts its own changes.
        place = start // like.element_size()
        return like.new_empty(0).set_(self.bytes.untyped_storage(), place, (rows, columns), (columns, 1))


_kept: ContextVar[ActivationArena | None] = ContextVar("kept", default=None)
_memory = threading.local()


def kept(like: Tensor, rows: int, columns: int, wanted: bool = True) -> Tensor:
    """An empty tensor that is kept for the backward pass: rows x columns.

    Args:
        wanted: There is a backward pass: frozen layers below the lowest trained one have none.
    """
    place = _kept.get() if wanted else None
    return like.new_empty(rows, columns) if place is None else place.take(like, rows, columns)


def forget_transient() -> None:
    """Free what `transient_like` holds in this thread."""
    vars(_memory).clear()


def transient_like(like: Tensor) -> Tensor:
    """An empty tensor of its shape, in memory that this thread's next one takes again."""
    held: dict[torch.dtype, Tensor] = vars(_memory).setdefault("held", {})
    if like.dtype not in held or held[like.dtype].numel() < like.numel():
        held[like.dtype] = like.new_empty(like.numel())
    return held[like.dtype][: like.numel()].view(like.shape)
