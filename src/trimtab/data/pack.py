"""Packs: the micro-batches that are computed, without padding, and without what several of their sequences begin with twice."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from trimtab.core.process import gc_paused
from trimtab.data.bin_packing import first_fit_decreasing, in_lexical_order
from trimtab.data.example import TokenRow, row_groups
from trimtab.data.prefix_tree import Numbers, Segment, lay_out, numbers, places


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
    sequences: tuple[TokenRow, ...]
    """S, what was packed."""
    leaves: tuple[int, ...]
    """Of each sequence, the segment in which it ends."""

    @property
    def mismatched(self) -> bool:
        """It has no loss."""
        return self.sequences[0].side == "mismatched"

    @property
    def pairs(self) -> list[int]:
        """By segment, its tokens times those that they attend to: n² for a row of n tokens alone."""
        seen = [0] * len(self.segments)
        for number, (start, end, parent) in enumerate(self.segments):
            seen[number] = end - start + (seen[parent] if parent >= 0 else 0)
        return [(end - start) * length for (start, end, _), length in zip(self.segments, seen, strict=True)]

    @property
    def targets(self) -> int:
        return len(self.target_token)

    def places(self, number: int) -> Tensor:
        """Where the tokens of a sequence stand."""
        return torch.from_numpy(places(self.segments, self.leaves[number]))

    def to(self, device: torch.device) -> "Pack":
        names = ("ids", "positions", "target_at", "target_token", "target_sequence")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


def pack_flat(sequences: Iterable[TokenRow]) -> Pack:
    """Sequences side by side in their order, each a segment of its own: what rows of different adapters need."""
    return _laid_out(tuple(sequences), share=False)


def pack_tree(sequences: Iterable[TokenRow]) -> Pack:
    """Sequences as a tree: what several begin with is computed once. The same in every other respect."""
    return _laid_out(tuple(sequences), share=True)


def _laid_out(sequences: tuple[TokenRow, ...], share: bool, rows: Sequence[Numbers] | None = None) -> Pack:
    """
    Args:
        rows: Their tokens, if they are arrays already.
    """
    rows = rows or [numbers(sequence.ids) for sequence in sequences]
    tree = lay_out([row[:-1] for row in rows], share=share)  # a last token predicts nothing
    rows_and_leaves = zip(sequences, rows, tree.leaves, strict=True)
    targets = [_targets(tree.segments, leaf, row, sequence.target_indices) for sequence, row, leaf in rows_and_leaves]
    at, token = (torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*targets, strict=True))
    of = torch.from_numpy(np.repeat(np.arange(len(targets)), [len(positions) for positions, _ in targets]))
    ids, positions = torch.from_numpy(tree.ids), torch.from_numpy(tree.positions)
    return Pack(ids, positions, tree.segments, at, token, of, sequences, tree.leaves)


Targets = tuple[Numbers, Numbers]
"""Of one sequence: where the tokens stand that predict what it learns, and what that is."""


def _targets(segments: tuple[Segment, ...], leaf: int, row: Numbers, learned: list[int]) -> Targets:
    start, end, _ = segments[leaf]
    before = len(row) - 1 - (end - start)  # tokens of the row in other segments
    if learned and before < learned[0] and learned[-1] - learned[0] + 1 == len(learned):  # one answer, as most rows have
        at = start + learned[0] - 1 - before
        return np.arange(at, at + len(learned)), row[learned[0] : learned[-1] + 1]
    which = numbers(learned)
    return places(segments, leaf)[which - 1], row[which]


@gc_paused()
def pack_all(sequences: Iterable[TokenRow], tokens: int) -> list[Pack]:
    """Token rows as packs of at most `tokens` tokens (a longer row gets a pack of its own). Deterministic.

    The two answers of a pair are never parted. Mismatched answers have packs of their own, the first ones, since every loss of the
    step depends on them; they have no backward pass, so their packs have up to `FORWARD` times the tokens. Rows that share a prefix
    stay together, as many as fit; those runs are packed first-fit decreasing, which takes at most 11/9 of the fewest possible
    packs, plus one (Johnson 1973). If that makes a few packs, they are filled again up to less, as long as they are no more:
    memory is that of the largest.
    """
    sequences = list(sequences)
    mismatched = [row for row in sequences if row.side == "mismatched"]
    if 0 < len(mismatched) < len(sequences):
        matched = [row for row in sequences if row.side != "mismatched"]
        return [*pack_all(mismatched, FORWARD * tokens), *pack_all(matched, tokens)]
    rows = [numbers(sequence.ids) for sequence in sequences]
    alike = in_lexical_order([row[:-1] for row in rows], row_groups(sequences))
    bins = first_fit_decreasing(alike, tokens)
    least = sum(one.tokens for one in bins) // max(1, len(bins))
    if 1 < len(bins) <= FEW and least < tokens:
        evener = (first_fit_decreasing(alike, least + (tokens - least) * part // 8) for part in range(8))
        bins = next((even for even in evener if len(even) <= len(bins)), bins)
    together = [sorted(one.numbers) for one in bins]
    return [_laid_out(tuple(sequences[n] for n in some), True, [rows[n] for n in some]) for some in together]


FORWARD = 4
"""How many times as many tokens can be computed at a time where nothing is kept for a backward pass."""
FEW = 16
"""Packs that are filled again."""
