"""Values made on the host, sent to a device without waiting for it; and values of a device, read by a single wait."""

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(values: Tensor | Sequence[int], device: torch.device) -> Tensor:
    """Values on the host (numbers become int64) on the device.

    A copy from pinned memory does not wait for what the device computes. Only CUDA's (and ROCm's) is taken: elsewhere there may be
    none, and a copy that does not wait might read memory that has been freed.
    """
    held = values if isinstance(values, Tensor) else torch.tensor(values, dtype=torch.int64)
    if device.type == "cuda" and held.is_cpu:
        return held.pin_memory().to(device, non_blocking=True)
    return held.to(device, non_blocking=device.type == "meta")  # where nothing is copied, and tests look for what would wait


def numbers_like(values: Sequence[float], like: Tensor) -> Tensor:
    """Numbers known on the host, in the type and on the device of a tensor."""
    return to_device(torch.tensor(values, dtype=like.dtype), like.device)


def read(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of floating point on the host, in the widest of their types: all by one copy, since each waits for the device."""
    if not tensors:
        return []
    widest = max((t.dtype for t in tensors), key=lambda dtype: torch.finfo(dtype).bits)
    flat = torch.cat([t.detach().flatten().to(widest) for t in tensors]).cpu()
    return [part.view(t.shape) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)]
