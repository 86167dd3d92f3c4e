"""The segments of a pack in batches, for computations that go from token to token: parents before children.

Shapes: S segments in a batch, L tokens of the longest of them.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.core.transfer import to_device
from trimtab.engine.layouts import PackLayout


class Batch(NamedTuple):
    """Segments of one depth that a scan goes through together, padded on the right."""

    segments: list[int]
    depth: int
    tokens: Tensor
    """S L, of their tokens."""
    real: Tensor
    """Those of the S · L that are not padding."""
    exact: bool
    """All have L tokens, so that the states in which they end are known."""


CHUNK = 64
"""Tokens that scans go through at once: segments of as many chunks are a batch without waste."""


def batches(layout: PackLayout, all_states: bool, device: torch.device) -> Iterator[Batch]:
    """All segments, parents first; their tensors on the device."""
    if layout.batches is None:
        made = _make_batches(layout, all_states)
        layout.batches = [b._replace(tokens=to_device(b.tokens, device), real=to_device(b.real, device)) for b in made]
    yield from layout.batches


def _make_batches(layout: PackLayout, all_states: bool) -> Iterator[Batch]:
    parents = {parent for _, _, parent in layout.segments}
    groups: dict[tuple[int, bool, int], list[int]] = {}
    for number, (path, length) in enumerate(zip(layout.paths, layout.lengths, strict=True)):
        exact = all_states or number in parents  # padding would change the state in which it ends
        groups.setdefault((len(path) - 1, exact, length if exact else -(-length // CHUNK)), []).append(number)
    for (depth, exact, _), numbers in sorted(groups.items()):
        longest = max(layout.lengths[number] for number in numbers)
        offsets = torch.arange(longest)
        starts = torch.tensor([layout.segments[number].start for number in numbers])
        lengths = torch.tensor([layout.lengths[number] for number in numbers])
        tokens = starts[:, None] + torch.minimum(offsets, lengths[:, None] - 1)
        real = (offsets < lengths[:, None]).flatten().nonzero()[:, 0]
        yield Batch(numbers, depth, tokens, real, exact)
