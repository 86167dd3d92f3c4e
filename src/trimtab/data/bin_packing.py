"""Which rows are computed together: those that begin alike, as many as fit, then first-fit decreasing. Near-linear in the rows."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from trimtab.data.example import TokenRow, units
from trimtab.data.prefix_tree import MIN_SAVED, Numbers, as_array, lexical_order, shared_length


class Unit(NamedTuple):
    """Rows that are never parted: the answers to one prompt that are compared, or a row by itself."""

    numbers: list[int]
    tokens: int
    """At most so many are computed."""
    saved: int
    """Of those, what need not be computed after the unit before it."""


@dataclass
class Run:
    """Rows that are computed together."""

    numbers: list[int]
    tokens: int
    """At most so many, computed."""

    def add(self, numbers: list[int], tokens: int) -> None:
        self.numbers += numbers
        self.tokens += tokens


def in_lexical_order(rows: Sequence[Numbers], whole: Sequence[list[int]]) -> list[Unit]:
    """Units, so that those which begin alike are neighbours.

    Args:
        rows: What is computed of each.
        whole: The numbers of the rows in each unit.
    """
    ordered = [whole[n] for n in lexical_order([rows[unit[0]] for unit in whole])]
    saved = [0, *(_saved(rows[before[-1]], rows[unit[0]]) for before, unit in pairwise(ordered))]
    return [Unit(unit, _together([rows[n] for n in unit]), less) for unit, less in zip(ordered, saved, strict=False)]


def filled(ordered: Iterable[Unit], tokens: int) -> list[Run]:
    """First-fit decreasing: each run, the longest first, goes into the first bin that has room for it."""
    runs = sorted(_runs(ordered, tokens), key=lambda run: (-run.tokens, run.numbers))
    bins = [Run([], 0) for _ in runs]  # as many as there can be
    leaves = 1 << (len(bins) - 1).bit_length()
    room = [tokens] * (2 * leaves)  # a binary tree: the most room that a bin below has; bin n is number leaves + n
    for run in runs:
        at, needed = 1, min(run.tokens, tokens)
        while at < leaves:
            at *= 2
            at += room[at] < needed
        bins[at - leaves].add(run.numbers, run.tokens)
        room[at] -= run.tokens
        while at > 1:
            room[at // 2] = max(room[at], room[at ^ 1])
            at //= 2
    return [one for one in bins if one.numbers]


def _runs(ordered: Iterable[Unit], tokens: int) -> list[Run]:
    """Neighbours that share tokens, as long as they fit."""
    runs: list[Run] = []
    for unit in ordered:
        if not runs or not unit.saved or runs[-1].tokens + unit.tokens - unit.saved > tokens:
            runs.append(Run([*unit.numbers], unit.tokens))
        else:
            runs[-1].add(unit.numbers, unit.tokens - unit.saved)
    return runs


def _saved(before: Numbers, row: Numbers) -> int:
    """Tokens that a row need not have computed after another. Up to MIN_SAVED - 1 shared ones stand twice: they are not worth a segment."""
    return max(0, shared_length(before, row) - MIN_SAVED + 1)


def _together(rows: Sequence[Numbers]) -> int:
    """Tokens of rows that share what they begin with; at most so many are computed."""
    return sum(map(len, rows)) - sum(_saved(before, row) for before, row in pairwise(rows))


def most_together(sequences: Iterable[TokenRow]) -> int:
    """Tokens of the largest unit, which no pack can part."""
    sequences = list(sequences)
    return max((_together([as_array(sequences[n].ids)[:-1] for n in unit]) for unit in units(sequences)), default=1)
