"""Rows laid out so that what several begin with stands once: a flat run of tokens and a tree of segments.

A token sees its own segment up to itself, and all of the segment's ancestors. A row is a path from a root to its leaf; rows
with nothing in common are a forest of single segments. Nothing here or above knows how attention does that.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import groupby, pairwise
from typing import Any, NamedTuple

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

    ids: list[int]
    positions: list[int]
    """Each token's place in its own row."""
    segments: tuple[Segment, ...]
    leaves: tuple[int, ...]
    """Of each row, the segment in which it ends."""


def places(segments: Sequence[Segment], leaf: int) -> list[int]:
    """Where the tokens of the row stand that ends in this segment."""
    found: list[int] = []
    while leaf >= 0:
        start, end, leaf = segments[leaf]
        found[:0] = range(start, end)
    return found


def paths_of(segments: Sequence[Segment]) -> list[list[int]]:
    """Each segment's ancestors, from the root, and itself."""
    paths: list[list[int]] = []
    for number, (_, _, parent) in enumerate(segments):
        paths.append([*(paths[parent] if parent >= 0 else []), number])
    return paths


def lay_out(rows: Sequence[Sequence[int]], *, share: bool = True) -> Tree:
    """Rows, none of them empty, as a tree; or, without sharing, side by side in their order."""
    ids: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    leaves = [-1] * len(rows)

    def add(row: Sequence[int], start: int, end: int, parent: int) -> int:
        segments.append(Segment(len(ids), len(ids) + end - start, parent))
        ids.extend(row[start:end])
        positions.extend(range(start, end))
        return len(segments) - 1

    # Groups of rows in lexical order that are alike up to `known`, of which `laid` tokens have been laid out already.
    todo = [(alphabetical(rows), 0, -1)] if share else [([number], 0, -1) for number in reversed(range(len(rows)))]
    while todo:
        group, laid, parent = todo.pop()
        if not group:
            continue
        known = shared_length(rows[group[0]], rows[group[-1]])  # what the first and the last share, all do
        if (known - laid) * (len(group) - 1) >= WORTH:
            parent, laid = add(rows[group[0]], laid, known, parent), known
        ended = [number for number in group if len(rows[number]) == known]
        for number in ended:
            leaves[number] = parent if laid == known else add(rows[number], laid, known, parent)
        branches = [list(branch) for _, branch in groupby(group[len(ended) :], key=lambda number: rows[number][known])]
        todo += [(branch, laid, parent) for branch in reversed(branches)]
    return Tree(ids, positions, tuple(segments), tuple(leaves))


def chained(segments: Sequence[Segment], cuts: Iterable[int]) -> tuple[Segment, ...]:
    """The same tree with segments as chains, parted before these tokens."""
    made, last, ordered = list[Segment](), list[int](), sorted(set(cuts))
    for start, end, parent in segments:
        above = last[parent] if parent >= 0 else -1
        inside = ordered[bisect_right(ordered, start) : bisect_left(ordered, end)]
        for low, high in pairwise([start, *inside, end]):
            made.append(Segment(low, high, above))
            above = len(made) - 1
        last.append(above)
    return tuple(made)


def evenly_chained(segments: tuple[Segment, ...], most: int) -> tuple[Segment, ...]:
    """The same tree with segments of more than `most` tokens as chains of even ones."""
    counts = [(start, end, -(-(end - start) // most)) for start, end, _ in segments]
    return chained(segments, (start + (end - start) * n // count for start, end, count in counts for n in range(count)))


def alphabetical(rows: Sequence[Sequence[int]]) -> list[int]:
    """Numbers of rows, so that those which begin alike are neighbours."""
    return sorted(range(len(rows)), key=lambda number: rows[number])  # type: ignore[arg-type, return-value]


def shared_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many tokens two rows (or characters two texts) begin with in common."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
