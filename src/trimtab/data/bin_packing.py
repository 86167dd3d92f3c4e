"""Which rows go into one pack: those with a common prefix, as many as fit, then first-fit decreasing. Near-linear in the rows."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from trimtab.core.processes import Processes
from trimtab.data.example import TokenRow, row_groups
from trimtab.data.prefix_tree import MIN_SAVED, Numbers, as_array, lexical_order, shared_length


class Group(NamedTuple):
    """Rows that stay in one pack: the answers to one prompt that are compared, or a row by itself."""

    numbers: list[int]
    tokens: int
    """An upper bound of those that are processed."""
    saved: int
    """How many of those the group before it saves."""


@dataclass
class Bin:
    """Rows that go into one pack."""

    numbers: list[int]
    tokens: int
    """An upper bound of those that are processed."""

    def add(self, numbers: list[int], tokens: int) -> None:
        self.numbers += numbers
        self.tokens += tokens


def in_lexical_order(rows: Sequence[Numbers], groups: Sequence[list[int]]) -> list[Group]:
    """Groups in an order in which those with a common prefix are neighbours.

    Args:
        rows: The tokens of each row that are processed.
        groups: The indices of the rows in each group.
    """
    ordered = [groups[n] for n in lexical_order([rows[group[0]] for group in groups])]
    saved = [0, *(_saved(rows[before[-1]], rows[group[0]]) for before, group in pairwise(ordered))]
    return [Group(group, _processed([rows[n] for n in group]), less) for group, less in zip(ordered, saved, strict=False)]


def in_given_order(rows: Sequence[Numbers], groups: Sequence[list[int]]) -> list[Group]:
    """Groups of rows that share nothing."""
    return [Group(group, sum(len(rows[n]) for n in group), 0) for group in groups]


def first_fit_decreasing(ordered: Iterable[Group], tokens: int) -> list[Bin]:
    """Bins of at most so many tokens: each run of neighbours, the longest first, goes into the first bin with space for it."""
    runs = sorted(_runs(ordered, tokens), key=lambda run: (-run.tokens, run.numbers))
    bins = [Bin([], 0) for _ in runs]  # as many as there can be
    leaves = 1 << (len(bins) - 1).bit_length()
    free = [tokens] * (2 * leaves)  # a binary tree: the most free tokens of a bin below; bin n is number leaves + n
    for run in runs:
        at, needed = 1, min(run.tokens, tokens)
        while at < leaves:
            at *= 2
            at += free[at] < needed
        bins[at - leaves].add(run.numbers, run.tokens)
        free[at] -= run.tokens
        while at > 1:
            free[at // 2] = max(free[at], free[at ^ 1])
            at //= 2
    return [bin for bin in bins if bin.numbers]


def divisible_bins(ordered: Sequence[Group], tokens: int, processes: int) -> list[Bin]:
    """Bins of at most so many tokens that processes can divide evenly: of several sizes, one by which the process with most has least.

    Smaller bins are not always more even, and share fewer prefixes, which is more to compute. Of sizes that are as good to 1 %, it is the
    one with the fewest bins.
    """
    largest = first_fit_decreasing(ordered, tokens)
    total, least = sum(full.tokens for full in largest), max(group.tokens for group in ordered)
    fewest, divided = -(-total // (tokens * processes)), [largest]
    several = len(ordered) <= MANY
    sizes = {
        max(least, math.ceil((1 + room) * total / (count * processes)))
        for count in range(fewest, fewest + (4 if several else 2))
        for room in (ROOMS if several else ROOMS[1:2])
    }
    divided += [first_fit_decreasing(ordered, size) for size in sorted(sizes) if size < tokens]
    work = [_work_of_busiest(bins, processes) for bins in divided]
    return min((bins for bins, most in zip(divided, work, strict=True) if most <= 1.01 * min(work)), key=len)


MANY = 1_000
"""Groups of which fewer sizes are tried: so many are divided evenly anyway, and it takes time."""
ROOMS = (0.0, 0.02, 0.05, 0.1)
"""By how much bins may be larger than equal parts, so that bins that are not quite full leave no small one over."""


def _work_of_busiest(bins: Sequence[Bin], processes: int) -> int:
    shares = Processes(0, processes).share([full.tokens for full in bins])
    return max(sum(bins[number].tokens for number in share) for share in shares)


def _runs(ordered: Iterable[Group], tokens: int) -> list[Bin]:
    """Neighbours that share tokens, as long as they fit."""
    runs: list[Bin] = []
    for group in ordered:
        if not runs or not group.saved or runs[-1].tokens + group.tokens - group.saved > tokens:
            runs.append(Bin([*group.numbers], group.tokens))
        else:
            runs[-1].add(group.numbers, group.tokens - group.saved)
    return runs


def _saved(before: Numbers, row: Numbers) -> int:
    """Tokens of a row that the one before it saves. Up to MIN_SAVED - 1 shared ones are processed twice: they are not worth a segment."""
    return max(0, shared_length(before, row) - MIN_SAVED + 1)


def _processed(rows: Sequence[Numbers]) -> int:
    """An upper bound of the tokens that are processed of rows which share prefixes."""
    return sum(map(len, rows)) - sum(_saved(before, row) for before, row in pairwise(rows))


def largest_group_tokens(rows: Iterable[TokenRow], *, share: bool = True) -> int:
    """Tokens of the largest group, which no pack can divide."""
    rows = list(rows)
    arrays, groups = [as_array(row.ids)[:-1] for row in rows], row_groups(rows)
    if not share:
        return max((group.tokens for group in in_given_order(arrays, groups)), default=1)
    return max((_processed([arrays[n] for n in group]) for group in groups), default=1)
