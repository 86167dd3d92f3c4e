"""Token rows as a prefix tree: a flat array of tokens, in which shared prefixes stand once, and a tree of segments.

A token attends to its own segment up to itself, and to all of the segment's ancestors. A row is a path from a root to its leaf;
rows without shared prefixes are a forest of single segments. How attention does that, only the engine knows.
"""

from array import array
from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]

MIN_SAVED = 8
"""Tokens that a shared segment must save: as much as attending to one more segment costs."""


class Segment(NamedTuple):
    """Tokens `start:end`, to which all descendants attend."""

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
    """The segment in which each row ends."""


def as_array(tokens: Sequence[int] | Numbers) -> Numbers:
    """A list as an array, in a third of numpy's own time."""
    return tokens if isinstance(tokens, np.ndarray) else np.frombuffer(array("q", tokens), dtype=np.int64)


def token_indices(segments: Sequence[Segment], leaf: int) -> Numbers:
    """The indices of the tokens of the row that ends in this segment."""
    parts: list[Numbers] = []
    while leaf >= 0:
        start, end, leaf = segments[leaf]
        parts.append(np.arange(start, end))
    return np.concatenate(parts[::-1])


def paths_of(segments: Sequence[Segment]) -> list[list[int]]:
    """Each segment's ancestors, from the root, and itself."""
    paths: list[list[int]] = []
    for number, (_, _, parent) in enumerate(segments):
        paths.append([*(paths[parent] if parent >= 0 else []), number])
    return paths


def lay_out(rows: Sequence[Sequence[int] | Numbers], *, share: bool = True) -> Tree:
    """Rows, none of them empty, as a tree; or, without sharing, side by side in their order."""
    arrays = [as_array(row) for row in rows]
    parts, spans = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    segments: list[Segment] = []
    leaves = [-1] * len(arrays)

    def add(row: Numbers, start: int, end: int, parent: int) -> int:
        first = segments[-1].end if segments else 0
        segments.append(Segment(first, first + end - start, parent))
        parts.append(row[start:end])
        spans.append(np.arange(start, end))
        return len(segments) - 1

    # Rows in lexical order that share a prefix, of which `done` tokens are in segments already, the last of them `parent`.
    groups = [(lexical_order(arrays), 0, -1)] if share else [([number], 0, -1) for number in reversed(range(len(arrays)))]
    while groups:
        group, done, parent = groups.pop()
        if not group:
            continue
        if len(group) == 1:
            leaves[group[0]] = add(arrays[group[0]], done, len(arrays[group[0]]), parent)
            continue
        shared = shared_length(arrays[group[0]], arrays[group[-1]])  # what the first and the last share, all do
        if (shared - done) * (len(group) - 1) >= MIN_SAVED:
            parent, done = add(arrays[group[0]], done, shared, parent), shared
        ended = [number for number in group if len(arrays[number]) == shared]
        for number in ended:
            leaves[number] = parent if done == shared else add(arrays[number], done, shared, parent)
        branches = [list(branch) for _, branch in groupby(group[len(ended) :], key=lambda number: arrays[number][shared])]
        groups += [(branch, done, parent) for branch in reversed(branches)]
    return Tree(np.concatenate(parts), np.concatenate(spans), tuple(segments), tuple(leaves))


def split_long(segments: tuple[Segment, ...], most: int) -> tuple[Segment, ...]:
    """The same tree with segments of more than `most` tokens as chains of shorter ones, evenly."""
    chained, last = list[Segment](), list[int]()
    for start, end, parent in segments:
        above, count = last[parent] if parent >= 0 else -1, -(-(end - start) // most)
        for low, high in pairwise(start + (end - start) * n // count for n in range(count + 1)):
            chained.append(Segment(low, high, above))
            above = len(chained) - 1
        last.append(above)
    return tuple(chained)


def lexical_order(rows: Sequence[Numbers]) -> list[int]:
    """The rows' indices in lexical order of their tokens."""
    texts = [row.astype(">u4").tobytes() for row in rows]  # which compare as their tokens do, but fast
    return sorted(range(len(rows)), key=texts.__getitem__)


def shared_length(a: Numbers, b: Numbers) -> int:
    """Tokens of the longest common prefix of two rows."""
    shortest = min(len(a), len(b))
    if not shortest or a[0] != b[0]:
        return 0
    same = a[:shortest] == b[:shortest]
    first_different = int(same.argmin())
    return shortest if same[first_different] else first_different
