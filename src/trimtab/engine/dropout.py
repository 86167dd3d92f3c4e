"""Dropout masks: saved for the backward pass on CPUs, where drawing takes long, and drawn again on accelerators, where memory is short."""

import torch
from torch import Tensor


def draw(like: Tensor, p: float) -> Tensor:
    """What `kept` needs for a mask of T d, from the default generator of the CPU: the mask, T d, or a seed, on the CPU.

    On CPUs it is the mask that nn.Dropout would draw.
    """
    if like.device.type in ("cpu", "meta"):
        return torch.empty(like.shape, dtype=torch.bool, device=like.device).bernoulli_(1 - p)
    return torch.empty((), dtype=torch.int64).random_()  # nothing waits for the device


def kept(drawn: Tensor, like: Tensor, p: float) -> Tensor:
    """Which numbers of `like` (T d) are kept: T d, bool."""
    if drawn.dtype == torch.bool:
        return drawn
    generator = torch.Generator(like.device).manual_seed(int(drawn))
    return torch.empty(like.shape, dtype=torch.bool, device=like.device).bernoulli_(1 - p, generator=generator)
