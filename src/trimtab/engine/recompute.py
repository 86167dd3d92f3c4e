"""What packed passes compute again in the backward pass instead of keeping it: nothing, MLPs up to their activation, or whole layers."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar, copy_context
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from trimtab.core.attention_hook import holding
from trimtab.core.randomness import replay_from_here

Level = Literal["none", "mlp", "full"]
"""`mlp`: gate and up, most of what a layer keeps, for two of its seven matrix products; `full`: all but the layer's input."""

_level: ContextVar[Level] = ContextVar("level", default="none")


def recomputing(level: Level) -> AbstractContextManager[None]:
    """Packed passes within the block, in this thread, compute this much again in their backward passes."""
    return holding(_level, level)


def recomputed_level() -> Level:
    """Of the packed pass that is running."""
    return _level.get()


def recomputable(
    make: Callable[[Tensor], Sequence[Tensor]], x: Tensor, part: nn.Module
) -> tuple[Sequence[Tensor], AbstractContextManager[Any]]:
    """make(x), and a block in which operations, at the level `mlp`, do not keep what was made: it is made again when it is needed.

    Args:
        make: Makes the same of the same, random numbers aside, which are drawn again. `x` is kept.
        part: Has dropout in it, perhaps.
    """
    if _level.get() != "mlp" or not torch.is_grad_enabled():
        return make(x), nullcontext()
    draws = any(module.training for module in part.modules())
    replayed, context = replay_from_here(x.device) if draws else nullcontext, copy_context()
    made, x = make(x), x.detach()
    places = {_place(tensor): number for number, tensor in enumerate(made)}
    again: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor | int:
        return places.get(_place(tensor), tensor)

    def unpack(packed: Tensor | int) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        if packed not in again:
            with torch.no_grad(), replayed():
                again.update(enumerate(context.copy().run(make, x)))
        return again.pop(packed)

    return made, saved_tensors_hooks(pack, unpack)


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Which numbers a tensor has: those of another with the same memory, offset and shape."""
    return tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape
