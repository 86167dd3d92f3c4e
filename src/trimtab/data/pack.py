"""Packs: the micro-batches that are computed, without padding, and without what several of their sequences begin with twice."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from trimtab.data.example import Sequence, units
from trimtab.data.tree import WORTH, Segment, alphabetical, lay_out, places, shared_length


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
    leaves: tuple[int, ...]
    """Of each sequence, the segment in which it ends."""

    @property
    def targets(self) -> int:
        return len(self.target_token)

    def places(self, number: int) -> list[int]:
        """Where the tokens of a sequence stand."""
        return places(self.segments, self.leaves[number])

    def to(self, device: torch.device) -> "Pack":
        moved = {
            n: getattr(self, n).to(device, non_blocking=True)
            for n in ("ids", "positions", "target_at", "target_token", "target_sequence")
        }
        return replace(self, **moved)


def pack_flat(sequences: Iterable[Sequence]) -> Pack:
    """Sequences side by side in their order, each a segment of its own: what rows of different adapters need."""
    return _pack(tuple(sequences), share=False)


def pack_tree(sequences: Iterable[Sequence]) -> Pack:
    """Sequences as a tree: what several begin with is computed once. The same in every other respect."""
    return _pack(tuple(sequences), share=True)


def _pack(sequences: tuple[Sequence, ...], share: bool) -> Pack:
    tree = lay_out([sequence.ids[:-1] for sequence in sequences], share=share)  # a last token predicts nothing
    targets: list[tuple[int, int, int]] = []
    for number, sequence in enumerate(sequences):
        where = places(tree.segments, tree.leaves[number])
        targets += [(where[t - 1], sequence.ids[t], number) for t in sequence.learned]
    at, token, of = torch.tensor(targets, dtype=torch.long).reshape(-1, 3).T
    ids, positions = torch.tensor(tree.ids), torch.tensor(tree.positions)
    return Pack(ids, positions, tree.segments, at.contiguous(), token.contiguous(), of.contiguous(), sequences, tree.leaves)


def pack_all(sequences: Iterable[Sequence], tokens: int) -> list[Pack]:
    """Sequences as packs of at most `tokens` computed tokens (a longer one gets a pack of its own). Deterministic.

    The two answers of a pair are never parted, and mismatched answers have packs of their own, the first ones, of up to
    `FORWARD` times the tokens, because they have no backward pass. Sequences that
    begin alike stay together, as many as fit; those runs are packed first-fit decreasing, which takes at most 11/9 of the
    fewest possible packs, plus one (Johnson 1973). If that makes a few packs, they are filled again up to less, as long as
    they are no more: memory is that of the largest.
    """
    sequences = list(sequences)
    apart = [one for one in sequences if one.side == "mismatched"]
    if apart and len(apart) < len(sequences):
        return [*pack_all(apart, FORWARD * tokens), *pack_all((one for one in sequences if one.side != "mismatched"), tokens)]
    bins = _filled(sequences, tokens)
    least = sum(one.tokens for one in bins) // max(1, len(bins))
    if 1 < len(bins) <= FEW and least < tokens:
        evener = (_filled(sequences, least + (tokens - least) * part // 8) for part in range(8))
        bins = next((even for even in evener if len(even) <= len(bins)), bins)
    return [pack_tree(sequences[n] for n in sorted(one.numbers)) for one in bins]


FORWARD = 4
"""How many times as many tokens can be computed at a time where nothing is kept for a backward pass."""
FEW = 16
"""Packs that are filled again."""


def _filled(sequences: list[Sequence], tokens: int) -> "list[_Run]":
    bins: list[_Run] = []
    for run in sorted(_runs(sequences, tokens), key=lambda run: (-run.tokens, run.numbers)):
        chosen = next((one for one in bins if one.tokens + run.tokens <= tokens), None)
        if chosen is None:
            bins.append(chosen := _Run([], 0))
        chosen.numbers += run.numbers
        chosen.tokens += run.tokens
    return bins


@dataclass
class _Run:
    """Sequences that are computed together."""

    numbers: list[int]
    tokens: int
    """At most so many, computed."""


def _runs(sequences: list[Sequence], tokens: int) -> list[_Run]:
    """Neighbours in lexical order that share tokens, as long as they fit."""
    rows, whole = [sequence.ids[:-1] for sequence in sequences], units(sequences)
    runs: list[_Run] = []
    before: list[int] = []
    for number in alphabetical([rows[unit[0]] for unit in whole]):
        unit = whole[number]
        saved, needed = _saved(before, rows[unit[0]]), _together([rows[n] for n in unit])
        if not runs or not saved or runs[-1].tokens + needed - saved > tokens:
            runs.append(_Run([], 0))
            saved = 0
        runs[-1].numbers += unit
        runs[-1].tokens += needed - saved
        before = rows[unit[-1]]
    return runs


def _saved(before: list[int], row: list[int]) -> int:
    """Tokens that a row need not have computed after another. Up to WORTH - 1 shared ones stand twice: they are not worth a segment."""
    return max(0, shared_length(before, row) - WORTH + 1)


def _together(rows: list[list[int]]) -> int:
    """Tokens of rows that share what they begin with; at most so many are computed."""
    return sum(map(len, rows)) - sum(_saved(before, row) for before, row in pairwise(rows))


def most_together(sequences: Iterable[Sequence]) -> int:
    """Tokens of the largest unit, which no pack can part."""
    sequences = list(sequences)
    return max((_together([sequences[n].ids[:-1] for n in unit]) for unit in units(sequences)), default=1)
