"""Rows laid out so that what several begin with stands once: a flat run of tokens and a tree of segments.

A token sees its own segment up to itself, and all of the segment's ancestors. A row is a path from a root to its leaf; rows
with nothing in common are a forest of single segments. Nothing here or above knows how attention does that.
"""

from array import array
from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]

WORTH = 8
"""Tokens that a shared segment must save: as much as attending to one more segment costs."""


class Segment(NamedTuple):
    """Tokens `start:end`, seen by their descendants."""

    start: int
    end: int
    parent: int
    """Index of the parent segment, which comes earlier in the list; -1 for a root."""


class Tree(NamedTuple):
    """Rows of tokens as a tree."""

    ids: Numbers
    positions: Numbers
    """Each token's place in its own row."""
    segments: tuple[Segment, ...]
    leaves: tuple[int, ...]
    """Of each row, the segment in which it ends."""


def numbers(some: Sequence[int] | Numbers) -> Numbers:
    """A list as an array, in a third of the time that numpy takes itself."""
    return some if isinstance(some, np.ndarray) else np.frombuffer(array("q", some), dtype=np.int64)


def places(segments: Sequence[Segment], leaf: int) -> Numbers:
    """Where the tokens of the row stand that ends in this segment."""
    found: list[Numbers] = []
    while leaf >= 0:
        start, end, leaf = segments[leaf]
        found.append(np.arange(start, end))
    return np.concatenate(found[::-1])


def paths_of(segments: Sequence[Segment]) -> list[list[int]]:
    """Each segment's ancestors, from the root, and itself."""
    paths: list[list[int]] = []
    for number, (_, _, parent) in enumerate(segments):
        paths.append([*(paths[parent] if parent >= 0 else []), number])
    return paths


def lay_out(given: Sequence[Sequence[int] | Numbers], *, share: bool = True) -> Tree:
    """Rows, none of them empty, as a tree; or, without sharing, side by side in their order."""
    rows = [numbers(row) for row in given]
    parts, spans = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    segments: list[Segment] = []
    leaves = [-1] * len(rows)

    def add(row: Numbers, start: int, end: int, parent: int) -> int:
        first = segments[-1].end if segments else 0
        segments.append(Segment(first, first + end - start, parent))
        parts.append(row[start:end])
        spans.append(np.arange(start, end))
        return len(segments) - 1

    # Groups of rows in lexical order that are alike up to `known`, of which `laid` tokens have been laid out already.
    todo = [(alphabetical(rows), 0, -1)] if share else [([number], 0, -1) for number in reversed(range(len(rows)))]
    while todo:
        group, laid, parent = todo.pop()
        if not group:
            continue
        if len(group) == 1:
            leaves[group[0]] = add(rows[group[0]], laid, len(rows[group[0]]), parent)
            continue
        known = shared_length(rows[group[0]], rows[group[-1]])  # what the first and the last share, all do
        if (known - laid) * (len(group) - 1) >= WORTH:
            parent, laid = add(rows[group[0]], laid, known, parent), known
        ended = [number for number in group if len(rows[number]) == known]
        for number in ended:
            leaves[number] = parent if laid == known else add(rows[number], laid, known, parent)
        branches = [list(branch) for _, branch in groupby(group[len(ended) :], key=lambda number: rows[number][known])]
        todo += [(branch, laid, parent) for branch in reversed(branches)]
    return Tree(np.concatenate(parts), np.concatenate(spans), tuple(segments), tuple(leaves))


def evenly_chained(segments: tuple[Segment, ...], most: int) -> tuple[Segment, ...]:
    """The same tree with segments of more than `most` tokens as chains of even ones."""
    chained, last = list[Segment](), list[int]()
    for start, end, parent in segments:
        above, count = last[parent] if parent >= 0 else -1, -(-(end - start) // most)
        for low, high in pairwise(start + (end - start) * n // count for n in range(count + 1)):
            chained.append(Segment(low, high, above))
            above = len(chained) - 1
        last.append(above)
    return tuple(chained)


def alphabetical(rows: Sequence[Numbers]) -> list[int]:
    """Numbers of rows, so that those which begin alike are neighbours."""
    texts = [row.astype(">u4").tobytes() for row in rows]  # which compare as their tokens do, but fast
    return sorted(range(len(rows)), key=texts.__getitem__)


def shared_length(one: Numbers, other: Numbers) -> int:
    """How many tokens two rows begin with in common."""
    shortest = min(len(one), len(other))
    if not shortest or one[0] != other[0]:
        return 0
    same = one[:shortest] == other[:shortest]
    first_different = int(same.argmin())
    return shortest if same[first_different] else first_different
