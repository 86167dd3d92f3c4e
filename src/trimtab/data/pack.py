"""Packs: the micro-batches that are computed, without padding, and without what several of their sequences begin with twice."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from trimtab.core.process import gc_paused
from trimtab.data.bin_packing import filled, in_lexical_order
from trimtab.data.example import TokenRow, units
from trimtab.data.prefix_tree import Numbers, Segment, chained, lay_out, numbers, places


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
    first: int = 0
    """Tokens of `segments` that come before its own: those of the pack that it goes on from."""
    after: "Pack | None" = None
    """Mismatched answers to its sequences' prompts, which go on from it: prompts are not computed for them again."""

    @property
    def mismatched(self) -> bool:
        """It has no loss."""
        return self.sequences[0].side == "mismatched"

    @property
    def estimates(self) -> bool:
        """Mismatched answers are computed with it."""
        return self.mismatched or self.after is not None

    @property
    def computed(self) -> int:
        """Tokens, with those that go on from it."""
        return len(self.ids) + (len(self.after.ids) if self.after is not None else 0)

    @property
    def pairs(self) -> list[int]:
        """By segment of its own, its tokens times those that they attend to: n² for a row of n tokens by itself."""
        seen = [0] * len(self.segments)
        for number, (start, end, parent) in enumerate(self.segments):
            seen[number] = end - start + (seen[parent] if parent >= 0 else 0)
        own = zip(self.segments, seen, strict=True)
        return [(end - start) * length for (start, end, _), length in own if start >= self.first]

    @property
    def targets(self) -> int:
        return len(self.target_token)

    def places(self, number: int) -> Tensor:
        """Where the tokens of a sequence stand."""
        return torch.from_numpy(places(self.segments, self.leaves[number]))

    def to(self, device: torch.device) -> "Pack":
        moved = {
            n: getattr(self, n).to(device, non_blocking=True)
            for n in ("ids", "positions", "target_at", "target_token", "target_sequence")
        }
        return replace(self, **moved, after=self.after.to(device) if self.after is not None else None)


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
    return _packed(tree.ids, tree.positions, tree.segments, targets, sequences, tree.leaves)


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


def _packed(
    ids: Numbers,
    positions: Numbers,
    segments: tuple[Segment, ...],
    targets: Sequence[Targets],
    sequences: tuple[TokenRow, ...],
    leaves: tuple[int, ...],
) -> Pack:
    at, token = (np.concatenate(some) for some in zip(*targets, strict=True))
    of = np.repeat(np.arange(len(targets)), [len(some) for some, _ in targets])
    made = torch.from_numpy
    return Pack(made(ids), made(positions), segments, made(at), made(token), made(of), sequences, leaves)


@gc_paused()
def pack_all(sequences: Iterable[TokenRow], tokens: int) -> list[Pack]:
    """Sequences as packs of at most `tokens` computed tokens (a longer one gets a pack of its own). Deterministic.

    The two answers of a pair are never parted, and what comes of mismatched answers says `_with_mismatched`. Sequences that
    begin alike stay together, as many as fit; those runs are packed first-fit decreasing, which takes at most 11/9 of the
    fewest possible packs, plus one (Johnson 1973). If that makes a few packs, they are filled again up to less, as long as
    they are no more: memory is that of the largest.
    """
    sequences = list(sequences)
    given: dict[int, list[TokenRow]] = {}  # a step can hold a row twice
    for row, other in pairwise(sequences):
        if other.side == "mismatched" and row.side != "mismatched":
            given.setdefault(id(row), []).append(other)
    if given:
        return _with_mismatched(pack_all((one for one in sequences if one.side != "mismatched"), tokens), given, tokens)
    rows = [numbers(sequence.ids) for sequence in sequences]
    alike = in_lexical_order([row[:-1] for row in rows], units(sequences))
    bins = filled(alike, tokens)
    least = sum(one.tokens for one in bins) // max(1, len(bins))
    if 1 < len(bins) <= FEW and least < tokens:
        evener = (filled(alike, least + (tokens - least) * part // 8) for part in range(8))
        bins = next((even for even in evener if len(even) <= len(bins)), bins)
    together = [sorted(one.numbers) for one in bins]
    return [_laid_out(tuple(sequences[n] for n in some), True, [rows[n] for n in some]) for some in together]


def _with_mismatched(packs: list[Pack], given: dict[int, list[TokenRow]], tokens: int) -> list[Pack]:
    """Packs of judged answers and of the mismatched ones given to them, in the order in which they can be computed.

    A loss needs to know all of the step's mismatched answers. They have packs of their own, the first ones, of up to `FORWARD`
    times the tokens, because they have no backward pass. Or, sparing their prompts, they go on from the pack of the answers that
    they are given to, where those can wait: the one answer of a pack, whose gradient is known up to a factor; then one other pack.
    """

    def spared(pack: Pack) -> int:
        return sum(row.target_indices[0] for row in pack.sequences) if all(id(row) in given for row in pack.sequences) else 0

    worth = [pack for pack in packs if spared(pack) >= WORTH_GOING_ON]
    one_answer = [pack for pack in worth if len(pack.sequences) == 1]
    several = sorted((pack for pack in worth if len(pack.sequences) > 1), key=spared, reverse=True)[:1]
    going_on = [_gone_on(pack, [given[id(row)].pop() for row in pack.sequences]) for pack in one_answer + several]
    gone_on = {id(pack) for pack in one_answer + several}
    others = [pack for pack in packs if id(pack) not in gone_on]
    apart = [other for several in given.values() for other in several]
    return [*pack_all(apart, FORWARD * tokens), *going_on, *others]


def _gone_on(pack: Pack, others: Sequence[TokenRow]) -> Pack:
    """The pack with a mismatched answer to the prompt of each of its sequences, from the prompt's last token on: that predicts."""
    own, rows = len(pack.ids), [(pack.places(n), row.target_indices[0] - 1) for n, row in enumerate(pack.sequences)]
    segments = [*chained(pack.segments, (int(row[known - 1]) + 1 for row, known in rows if known))]
    ends = {segment.end: number for number, segment in enumerate(segments)}
    ids: list[Numbers] = []
    positions: list[Numbers] = []
    targets: list[Targets] = []
    end = own
    for other, (row, known) in zip(others, rows, strict=True):
        tokens, learned = numbers(other.ids), numbers(other.target_indices)
        targets.append((learned + (end - own - known - 1), tokens[learned]))
        ids.append(tokens[known:-1])
        positions.append(np.arange(known, len(tokens) - 1))
        start, end = end, end + len(ids[-1])
        segments.append(Segment(start, end, ends[int(row[known - 1]) + 1] if known else -1))
    leaves = tuple(range(len(segments) - len(others), len(segments)))
    after = _packed(np.concatenate(ids), np.concatenate(positions), tuple(segments), targets, tuple(others), leaves)
    return replace(pack, after=replace(after, first=own))


FORWARD = 4
"""How many times as many tokens can be computed at a time where nothing is kept for a backward pass."""
FEW = 16
"""Packs that are filled again."""
WORTH_GOING_ON = 96
"""Tokens of prompts that must be spared: as much as another pass costs beside its tokens."""
