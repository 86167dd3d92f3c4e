"""Packs: the micro-batches that are computed, without padding, and without what several of their sequences begin with twice."""

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from trimtab.data.example import Sequence, units
from trimtab.data.tree import WORTH, Segment, alphabetical, chained, lay_out, places, shared_length


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
        return replace(self, **moved, after=self.after.to(device) if self.after is not None else None)


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
    return _packed(tree.ids, tree.positions, tree.segments, targets, sequences, tree.leaves)


def _packed(
    ids: list[int],
    positions: list[int],
    segments: tuple[Segment, ...],
    targets: list[tuple[int, int, int]],
    sequences: tuple[Sequence, ...],
    leaves: tuple[int, ...],
) -> Pack:
    at, token, of = (t.contiguous() for t in torch.tensor(targets, dtype=torch.long).reshape(-1, 3).T)
    return Pack(torch.tensor(ids), torch.tensor(positions), segments, at, token, of, sequences, leaves)


def pack_all(sequences: Iterable[Sequence], tokens: int) -> list[Pack]:
    """Sequences as packs of at most `tokens` computed tokens (a longer one gets a pack of its own). Deterministic.

    The two answers of a pair are never parted, and what comes of mismatched answers says `_with_mismatched`. Sequences that
    begin alike stay together, as many as fit; those runs are packed first-fit decreasing, which takes at most 11/9 of the
    fewest possible packs, plus one (Johnson 1973). If that makes a few packs, they are filled again up to less, as long as
    they are no more: memory is that of the largest.
    """
    sequences = list(sequences)
    given: dict[int, list[Sequence]] = {}  # a step can hold a row twice
    for row, other in pairwise(sequences):
        if other.side == "mismatched" and row.side != "mismatched":
            given.setdefault(id(row), []).append(other)
    if given:
        return _with_mismatched(pack_all((one for one in sequences if one.side != "mismatched"), tokens), given, tokens)
    bins = _filled(sequences, tokens)
    least = sum(one.tokens for one in bins) // max(1, len(bins))
    if 1 < len(bins) <= FEW and least < tokens:
        evener = (_filled(sequences, least + (tokens - least) * part // 8) for part in range(8))
        bins = next((even for even in evener if len(even) <= len(bins)), bins)
    return [pack_tree(sequences[n] for n in sorted(one.numbers)) for one in bins]


def _with_mismatched(packs: list[Pack], given: dict[int, list[Sequence]], tokens: int) -> list[Pack]:
    """Packs of judged answers and of the mismatched ones given to them, in the order in which they can be computed.

    A loss needs to know all of the step's mismatched answers. They have packs of their own, the first ones, of up to `FORWARD`
    times the tokens, because they have no backward pass. Or, sparing their prompts, they go on from the pack of the answers that
    they are given to, where those can wait: the one answer of a pack, whose gradient is known up to a factor; then one other pack.
    """

    def spared(pack: Pack) -> int:
        return sum(row.learned[0] for row in pack.sequences) if all(id(row) in given for row in pack.sequences) else 0

    worth = [pack for pack in packs if spared(pack) >= WORTH_GOING_ON]
    one_answer = [pack for pack in worth if len(pack.sequences) == 1]
    several = sorted((pack for pack in worth if len(pack.sequences) > 1), key=spared, reverse=True)[:1]
    going_on = [_gone_on(pack, [given[id(row)].pop() for row in pack.sequences]) for pack in one_answer + several]
    others = [pack for pack in packs if not any(pack is one for one in one_answer + several)]
    apart = [other for several in given.values() for other in several]
    return [*pack_all(apart, FORWARD * tokens), *going_on, *others]


def _gone_on(pack: Pack, others: SequenceOf[Sequence]) -> Pack:
    """The pack with a mismatched answer to the prompt of each of its sequences, from the prompt's last token on: that predicts."""
    own, rows = len(pack.ids), [(pack.places(n), row.learned[0] - 1) for n, row in enumerate(pack.sequences)]
    segments = [*chained(pack.segments, (row[known - 1] + 1 for row, known in rows if known))]
    ends = {segment.end: number for number, segment in enumerate(segments)}
    ids: list[int] = []
    positions: list[int] = []
    targets: list[tuple[int, int, int]] = []
    for number, (other, (row, known)) in enumerate(zip(others, rows, strict=True)):
        targets += [(len(ids) + at - known - 1, other.ids[at], number) for at in other.learned]
        start, parent = own + len(ids), ends[row[known - 1] + 1] if known else -1
        ids += other.ids[known:-1]
        segments.append(Segment(start, own + len(ids), parent))
        positions += range(known, len(other.ids) - 1)
    leaves = tuple(range(len(segments) - len(others), len(segments)))
    after = _packed(ids, positions, tuple(segments), targets, tuple(others), leaves)
    return replace(pack, after=replace(after, first=own))


FORWARD = 4
"""How many times as many tokens can be computed at a time where nothing is kept for a backward pass."""
FEW = 16
"""Packs that are filled again."""
WORTH_GOING_ON = 96
"""Tokens of prompts that must be spared: as much as another pass costs beside its tokens."""


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
