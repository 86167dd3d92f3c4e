"""Memory for activations: an arena for those saved for the backward pass, and scratch memory for those needed for a moment.

malloc would serve both, but freed scratch memory leaves holes between saved tensors, into which no aligned block of the same
size fits (glibc before 2.38): up to a third of a step's memory.
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
    """One block of memory, which each pack's forward pass fills from its start."""

    def __init__(self, size: float) -> None:
        """
        Args:
            size: Bytes that the largest pack saves. Those that no pack writes are never taken from the system.
        """
        self.bytes = torch.empty(int(size), dtype=torch.uint8)
        self.used = 0

    def reuse(self) -> AbstractContextManager[None]:
        """Within the block, in this thread, saved activations lie here, over those of the last block: its backward pass is over."""
        self.used = 0
        return holding(_active, self)

    def allocate(self, like: Tensor, rows: int, columns: int) -> Tensor:
        start, self.used = self.used, self.used + -(-rows * columns * like.element_size() // LINE) * LINE
        if not like.is_cpu or self.used > len(self.bytes):
            return like.new_empty(rows, columns)
        # Not a view of the block, so that each tensor has its own version counter.
        place = start // like.element_size()
        return like.new_empty(0).set_(self.bytes.untyped_storage(), place, (rows, columns), (columns, 1))


_active: ContextVar[ActivationArena | None] = ContextVar("active", default=None)
_scratch = threading.local()


def activation_like(like: Tensor, rows: int, columns: int, backward: bool = True) -> Tensor:
    """An empty tensor, rows x columns, to be saved for the backward pass.

    Args:
        backward: There is a backward pass: frozen layers below the lowest trained one have none.
    """
    arena = _active.get() if backward else None
    return like.new_empty(rows, columns) if arena is None else arena.allocate(like, rows, columns)


def free_scratch() -> None:
    """Free the memory that `scratch_like` holds in this thread."""
    vars(_scratch).clear()


def scratch_like(like: Tensor) -> Tensor:
    """An empty tensor of this shape, in memory that this thread's next scratch tensor takes over."""
    buffers: dict[torch.dtype, Tensor] = vars(_scratch).setdefault("buffers", {})
    if like.dtype not in buffers or buffers[like.dtype].numel() < like.numel():
        buffers[like.dtype] = like.new_empty(like.numel())
    return buffers[like.dtype][: like.numel()].view(like.shape)
