"""Probes: what is faster than the reference is taken on a device once it gave the same there, and what is not is said."""

import warnings
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor


class Probe(NamedTuple):
    """What came of one probe in this process."""

    what: str
    """Such as "norms by Triton"."""
    key: tuple[Hashable, ...]
    """Device, number types and sizes for which it was asked."""
    problem: str
    """Empty if it is proved."""


_probes: dict[tuple[Hashable, ...], Probe] = {}
_said: set[str] = set()


def proved(what: str, key: tuple[Hashable, ...], probe: Callable[[], str | None]) -> bool:
    """Whether a probe finds nothing wrong; it runs once a key. What is wrong is said once, as a RuntimeWarning.

    Args:
        probe: Returns what is wrong, or raises; it reads results on the host, and so waits for the device.

    Raises:
        torch.OutOfMemoryError: There is no memory for it now, which says nothing of later.
    """
    known = _probes.get((what, *key))
    if known is None:
        known = _probes[(what, *key)] = Probe(what, key, _problem(probe))
        if known.problem and known.problem not in _said:
            _said.add(known.problem)
            warnings.warn(f"{what}: not used here, PyTorch's operations are: {known.problem}", RuntimeWarning, stacklevel=2)
    return not known.problem


def probes() -> list[Probe]:
    """All that ran in this process."""
    return list(_probes.values())


def difference(ours: Tensor, reference: Tensor) -> str | None:
    """What is wrong if these are not the same but for rounding; the reference may have more bits.

    The bound of a number is an ulp of its size, and 32 of float32 of the largest, since sums have other orders.
    """
    if ours.shape != reference.shape:
        return f"a result is {tuple(ours.shape)} instead of {tuple(reference.shape)}"
    if not ours.numel():
        return None
    apart, size = (ours.float() - reference.float()).abs(), reference.float().abs()
    bound = size * torch.finfo(ours.dtype).eps + 32 * torch.finfo(torch.float32).eps * size.amax()
    wrong = int((~(apart <= bound)).sum())
    return f"{wrong} of {ours.numel()} numbers differ, by up to {float(apart.max()):.2g}" if wrong else None


def _problem(probe: Callable[[], str | None]) -> str:
    try:
        return probe() or ""
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever it is, the reference computes
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else 'it failed'}"
