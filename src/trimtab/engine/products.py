"""Matrix products of numbers of 16 bits, which leave in float32, in which they are summed."""

from functools import cache

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
"""The dtypes of 16 bits."""


def sums_of_products(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, in at least float32: factors of 16 bits have products that are not rounded."""
    if a.dtype not in HALF:
        return a @ b
    if has_float32_results(a.device.type):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


@cache
def has_float32_results(device_type: str) -> bool:
    """Whether torch (2.8 and later, not on CPUs) has products of 16-bit matrices in float32, without a copy of these."""
    if device_type == "cpu":
        return False
    one = torch.ones(8, 8, dtype=torch.float16, device=device_type)
    try:
        return torch.mm(one, one, out_dtype=torch.float32).dtype == torch.float32
    except (TypeError, RuntimeError):
        return False
