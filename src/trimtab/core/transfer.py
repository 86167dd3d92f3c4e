"""Values made on the host, sent to a device without waiting for it."""

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(values: Tensor | Sequence[int], device: torch.device) -> Tensor:
    """Values on the host (numbers become int64) on the device. A copy from pinned memory does not wait for what the device computes."""
    held = values if isinstance(values, Tensor) else torch.tensor(values, dtype=torch.int64)
    if device.type == "cuda" and held.device.type == "cpu":
        held = held.pin_memory()
    return held.to(device, non_blocking=True)
