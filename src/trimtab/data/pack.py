"""Sequences laid out without padding: a pack is a flat run of tokens and a tree of segments.

A token sees its own segment up to itself, and all of the segment's ancestors. A sequence is a path from a root to a
leaf; rows with nothing in common are a forest of single segments. Nothing here or above knows how attention does that.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.data.example import Sequence


class Segment(NamedTuple):
    """Tokens `start:end` of a pack, seen by their descendants."""

    start: int
    end: int
    parent: int
    """Index of the parent segment, which comes earlier in the list; -1 for a root."""


@dataclass(frozen=True)
class Pack:
    """One micro-batch. T tokens, N targets, S sequences.

    A target says "the token after `position` is `token`, in sequence `sequence`". Positions rather than a label a token,
    because the last token of a shared prompt has as many successors as answers hang on it.
    """

    ids: Tensor
    """T, int64."""
    positions: Tensor
    """T, int64: each token's place in its own sequence."""
    segments: tuple[Segment, ...]
    target_at: Tensor
    """N, int64: index into the pack's tokens."""
    target_token: Tensor
    """N, int64."""
    target_sequence: Tensor
    """N, int64, not decreasing."""
    sequences: tuple[Sequence, ...]
    """S, what was packed."""

    @property
    def targets(self) -> int:
        return len(self.target_token)

    def to(self, device: torch.device) -> "Pack":
        moved = {
            n: getattr(self, n).to(device, non_blocking=True)
            for n in ("ids", "positions", "target_at", "target_token", "target_sequence")
        }
        return Pack(segments=self.segments, sequences=self.sequences, **moved)


def pack_flat(sequences: Iterable[Sequence]) -> Pack:
    """Sequences side by side, each a segment of its own. The last token predicts nothing and is left out."""
    sequences = tuple(sequences)
    ids: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    targets: list[tuple[int, int, int]] = []
    for number, sequence in enumerate(sequences):
        start, read = len(ids), sequence.ids[:-1]
        ids += read
        positions += range(len(read))
        segments.append(Segment(start, len(ids), -1))
        targets += [(start + t - 1, sequence.ids[t], number) for t in sequence.learned]
    at, token, of = torch.tensor(targets, dtype=torch.long).reshape(-1, 3).T
    return Pack(
        torch.tensor(ids),
        torch.tensor(positions),
        tuple(segments),
        at.contiguous(),
        token.contiguous(),
        of.contiguous(),
        sequences,
    )


def pack_all(sequences: Iterable[Sequence], tokens: int) -> list[Pack]:
    """Sequences as few packs of at most `tokens` tokens (a longer sequence gets a pack of its own).

    First-fit decreasing: at most 11/9 of the fewest possible packs, plus one (Johnson 1973). Deterministic.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    sequences = list(sequences)
    for number in sorted(range(len(sequences)), key=lambda n: -len(sequences[n].ids)):
        length = len(sequences[number].ids) - 1
        chosen = next((b for b, free in enumerate(room) if free >= length), None)
        if chosen is None:
            bins.append([])
            room.append(tokens)
            chosen = len(bins) - 1
        bins[chosen].append(number)
        room[chosen] -= length
    return [pack_flat(sequences[n] for n in sorted(chosen)) for chosen in bins]
