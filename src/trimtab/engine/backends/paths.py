"""Attention over a tree as attention over separate sequences: a segment's queries, and the keys along its path gathered.

A segment's queries are the last tokens of its path, so causality in it is that of attention whose mask ends in the lower right
corner, which flash attention over sequences of various lengths has (arXiv:2307.08691). All of it is known on the host.

Shapes: T tokens, P virtual tokens, S sequences, L gathered keys.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trimtab.core.transfer import to_device
from trimtab.data.prefix_tree import Numbers, token_indices
from trimtab.engine.backends import AttentionPlan

MOST = 2**31 - 1
"""Numbers that kernels count in 32 bits: of gathered keys, as many as queries have heads; and of queries, padded to tiles."""
TILE = 128


class Call(NamedTuple):
    """S sequences side by side, whose queries are the tokens `start:end` of a pack."""

    start: int
    end: int
    cu_q: Tensor
    """S + 1, int32: where the queries of each begin, from `start` on."""
    cu_k: Tensor
    """S + 1, int32: where its gathered keys begin."""
    max_q: int
    """Of the longest."""
    max_k: int
    rows: Tensor | None = None
    """L, int32: which rows of [virtual; tokens] the gathered keys are. None, as the next two, if they are all tokens, as they stand."""
    starts: Tensor | None = None
    """P + T + 1, int32: copies of row r are the gathered keys `users[starts[r] : starts[r + 1]]`."""
    users: Tensor | None = None
    """L, int32."""


class _Piece(NamedTuple):
    """Queries of one segment that see the same first key."""

    start: int
    end: int
    rows: Numbers
    """Of [virtual; tokens], from the first that one of them sees to the last query's own."""


@lru_cache(maxsize=32)  # every layer of a kind asks for the same
def fits(plan: AttentionPlan, most: int = MOST) -> bool:
    """Whether each segment alone is small enough to be counted."""
    heads, lengths = plan.heads, list[int]()
    for start, end, parent in plan.segments:
        lengths.append(end - start + (lengths[parent] if parent >= 0 else plan.virtual + TILE))
    return max(lengths) * heads.groups * heads.per_group * heads.size <= most


@lru_cache(maxsize=32)
def calls_of(plan: AttentionPlan, device: torch.device, most: int = MOST) -> tuple[Call, ...]:
    """The calls that compute a plan: one, unless it would be too large to be counted."""
    heads = plan.heads
    room = most // (heads.groups * heads.per_group * heads.size)
    groups, queries, keys = list[list[_Piece]](), room + 1, 0
    for piece in _pieces(plan):
        queries, keys = queries + piece.end - piece.start + TILE, keys + len(piece.rows)
        if max(queries, keys) > room:
            groups.append([])
            queries, keys = piece.end - piece.start + TILE, len(piece.rows)
        groups[-1].append(piece)
    return tuple(_call(pieces, plan, device, alone=len(groups) == 1) for pieces in groups)


def _pieces(plan: AttentionPlan) -> Iterator[_Piece]:
    """In the order of their tokens."""
    at = 0
    for number, (start, end, _) in enumerate(plan.segments):
        assert start == at, "segments lie side by side, in their order"
        at = end
        rows = np.concatenate([np.arange(plan.virtual), plan.virtual + token_indices(plan.segments, number)])
        before = len(rows) - (end - start)
        cuts = [] if plan.chunk is None else range(before - before % plan.chunk + plan.chunk, len(rows), plan.chunk)
        for place, stop in pairwise([before, *cuts, len(rows)]):
            first = 0 if plan.window is None else max(0, place - plan.window + 1)
            first = first if plan.chunk is None else max(first, place - place % plan.chunk)
            yield _Piece(start + place - before, start + stop - before, rows[first:stop])


def _call(pieces: Sequence[_Piece], plan: AttentionPlan, device: torch.device, alone: bool) -> Call:
    start, end, rows = pieces[0].start, pieces[-1].end, np.concatenate([piece.rows for piece in pieces])
    queries, keys = [piece.end - piece.start for piece in pieces], [len(piece.rows) for piece in pieces]
    arrays: list[Sequence[int] | Numbers] = [[0, *accumulate(queries)], [0, *accumulate(keys)]]
    if not alone or plan.virtual or not np.array_equal(rows, np.arange(end)):
        uses = np.bincount(rows, minlength=plan.virtual + plan.segments[-1].end)
        arrays += [rows, np.concatenate([[0], uses.cumsum()]), rows.argsort(kind="stable")]
    joint = to_device(torch.from_numpy(np.concatenate(arrays).astype(np.int32)), device)  # in one transfer
    cu_q, cu_k, *others = joint.split([len(array) for array in arrays])
    return Call(start, end, cu_q, cu_k, max(queries), max(keys), *others)
