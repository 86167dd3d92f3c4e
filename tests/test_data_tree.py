"""Rows as a tree: nothing lost, nothing moved, and nothing twice that is worth sharing."""

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.core.processes import Processes
from trimtab.data import TokenRow, largest_group_tokens, lay_out, pack_all, pack_flat, pack_tree, prefix_tree
from trimtab.data.bin_packing import first_fit_decreasing, in_lexical_order

ROWS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=14), max_size=12)
"""Of three tokens, so that most begin alike."""


def prefixes(rows):
    return {tuple(row[: end + 1]) for row in rows for end in range(len(row))}


@settings(max_examples=300, deadline=None, derandomize=True)
@given(rows=ROWS, worth=st.sampled_from([1, 3, 8]))
def test_a_row_is_its_path_and_what_rows_share_stands_once(rows, worth):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_tree, "MIN_SAVED", worth)
        laid = lay_out(rows)
    for number, row in enumerate(rows):
        where = prefix_tree.token_indices(laid.segments, laid.leaves[number])
        assert [laid.ids[place] for place in where] == row
        assert [laid.positions[place] for place in where] == list(range(len(row)))
    ends = [0, *(segment.end for segment in laid.segments)]
    assert [segment.start for segment in laid.segments] == ends[:-1]
    assert ends[-1] == len(laid.ids)
    assert all(segment.start < segment.end and segment.parent < n for n, segment in enumerate(laid.segments))
    assert len(prefixes(rows)) <= len(laid.ids) <= sum(map(len, rows))
    assert len(laid.ids) <= len(prefixes(rows)) + (worth - 1) * max(0, len(rows) - 1)


@given(rows=ROWS)
def test_without_sharing_rows_stand_side_by_side_in_their_order(rows):
    laid = lay_out(rows, share=False)
    assert laid.ids.tolist() == [token for row in rows for token in row]
    assert laid.leaves == tuple(range(len(rows)))
    assert all(segment.parent == -1 for segment in laid.segments)


def test_the_segments_of_a_small_tree():
    head = [7] * 10
    laid = lay_out([[*head, 1, 2], [9, 9], [*head, 3], head], share=True)
    assert [tuple(segment) for segment in laid.segments] == [(0, 10, -1), (10, 12, 0), (12, 13, 0), (13, 15, -1)]
    assert laid.leaves == (1, 3, 2, 0)
    assert laid.ids.tolist() == [*head, 1, 2, 3, 9, 9]
    assert laid.positions.tolist() == [*range(10), 10, 11, 10, 0, 1]


@pytest.mark.parametrize(
    ("shared", "rows", "worth"), [(8, 2, True), (7, 2, False), (4, 3, True), (3, 3, False), (2, 5, True), (1, 8, False)]
)
def test_a_segment_is_laid_where_it_spares_eight_tokens(shared, rows, worth):
    assert prefix_tree.MIN_SAVED == 8
    laid = lay_out([[*[7] * shared, 10 + n] for n in range(rows)])
    assert len(laid.ids) == (shared + rows if worth else (shared + 1) * rows)
    head = [5] * 10
    below = lay_out([[*head, 1], *([*head, *[7] * shared, 10 + n] for n in range(rows))])
    assert len(below.ids) == 10 + 1 + len(laid.ids)


@pytest.mark.parametrize(("length", "most"), [(1, 4), (4, 4), (5, 4), (13, 4), (1000, 512), (1025, 512)])
def test_long_segments_are_parted_into_even_ones(length, most):
    whole = (
        prefix_tree.Segment(0, 3, -1),
        prefix_tree.Segment(3, 3 + length, 0),
        prefix_tree.Segment(3 + length, 5 + length, 1),
    )
    parts = prefix_tree.split_long(whole, most)
    sizes = [end - start for start, end, _ in parts[1:-1]]
    assert all(isinstance(number, int) for part in parts for number in part)
    assert len(sizes) == -(-length // most)
    assert sum(sizes) == length
    assert max(sizes) - min(sizes) <= 1
    assert [parent for _, _, parent in parts] == list(range(-1, len(parts) - 1))


def test_many_rows_each_the_beginning_of_the_next_do_not_exhaust_the_stack():
    rows = [list(range(8 * n)) for n in range(1, 1500)]
    laid = lay_out(rows)
    assert len(laid.ids) == 8 * 1499
    assert prefix_tree.token_indices(laid.segments, laid.leaves[700]).tolist() == list(range(8 * 701))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(rows=st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=14), max_size=12), limit=st.integers(1, 30))
def test_packs_of_rows_that_begin_alike_keep_to_their_limit(rows, limit):
    sequences = [TokenRow(ids, [len(ids) - 1], f"row:{n}") for n, ids in enumerate(rows)]
    packs = pack_all(sequences, limit)
    assert sorted(row.where for pack in packs for row in pack.rows) == sorted(row.where for row in sequences)
    assert all(len(pack.ids) <= limit or len(pack.rows) == 1 for pack in packs)


def first_fit(runs, limit):
    """First-fit decreasing in plain words: each run, the longest first, into the first bin with room for it."""
    bins = []
    for size, numbers in sorted(runs, key=lambda run: (-run[0], run[1])):
        chosen = next((one for one in bins if one[0] + size <= limit), None)
        if chosen is None:
            bins.append(chosen := [0, []])
        chosen[0] += size
        chosen[1] += numbers
    return bins


@settings(max_examples=300, deadline=None, derandomize=True)
@given(sizes=st.lists(st.integers(1, 40), max_size=80), limit=st.integers(1, 30))
def test_bins_are_those_of_first_fit_decreasing(sizes, limit):
    """Searched in a tree instead of one after the other: near-linear, and not a row elsewhere. Some are larger than a bin."""
    rows = [prefix_tree.as_array([n + 1] * size) for n, size in enumerate(sizes)]
    found = first_fit_decreasing(in_lexical_order(rows, [[n] for n in range(len(rows))]), limit)
    assert [[one.tokens, one.numbers] for one in found] == first_fit([(size, [n]) for n, size in enumerate(sizes)], limit)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(rows=st.lists(st.lists(st.sampled_from([0, 1, 255, 256, 65_536, 151_935]), max_size=9), max_size=12))
def test_lexical_order_and_what_is_shared_are_those_of_lists(rows):
    made = [prefix_tree.as_array(row) for row in rows]
    assert prefix_tree.lexical_order(made) == sorted(range(len(rows)), key=lambda n: rows[n])
    for one, other in pairwise(rows):
        plain = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
        assert prefix_tree.shared_length(prefix_tree.as_array(one), prefix_tree.as_array(other)) == plain


def test_rows_that_begin_alike_are_packed_together():
    families = [[head] * 20 + [head, tail] for tail in range(4) for head in range(3)]
    packs = pack_all([TokenRow(ids, [21], f"row:{n}") for n, ids in enumerate(families)], 60)
    assert [{row.ids[0] for row in pack.rows} for pack in packs] == [{0}, {1}, {2}]
    assert [len(pack.ids) for pack in packs] == [21, 21, 21]


def test_targets_follow_their_rows_into_what_is_shared():
    head = list(range(10, 20))
    rows = [TokenRow([*head, 1, 2], [3, 10, 11], "a"), TokenRow([*head, 4, 5], [3, 10], "b")]
    flat, shared = pack_flat(rows), pack_tree(rows)
    for pack in (flat, shared):
        said = zip(pack.ids[pack.target_at].tolist(), pack.target_token.tolist(), pack.target_row.tolist(), strict=True)
        assert list(said) == [(12, 13, 0), (19, 1, 0), (1, 2, 0), (12, 13, 1), (19, 4, 1)]
    assert shared.target_at.tolist() == [2, 9, 10, 2, 9]
    assert len(shared.ids) == 12


def test_packs_of_a_step_are_filled_again_up_to_less():
    """In eight tries between the mean and the limit, the last of which is the first to do with as few packs here."""
    rows = [
        TokenRow([token] * (length + 1), [length], f"row:{token}", length + 1)
        for token, length in enumerate((33, 33, 33, 2, 1))
    ]
    assert sorted(len(pack.ids) for pack in pack_all(rows, 70)) == [35, 67]
    assert sorted(len(pack.ids) for pack in pack_all(rows, 66)) == [36, 66], "there is nothing to gain"


def busiest(packs, processes):
    """Tokens of the process with most."""
    sizes = [len(pack.ids) for pack in packs]
    return max(sum(sizes[number] for number in share) for share in Processes(0, processes).share(sizes))


@pytest.mark.parametrize("processes", [2, 3, 8])
@pytest.mark.parametrize("prefix", [0, 30])
def test_packs_are_made_for_processes_to_divide(processes, prefix):
    draw = random.Random(processes)
    lengths = [min(400, int(draw.lognormvariate(3.9, 0.7)) + 2) for _ in range(64)]
    rows = [
        TokenRow([7] * prefix + [draw.randrange(10, 99) for _ in range(n)], [prefix + n - 1], f"row:{number}", prefix + n)
        for number, n in enumerate(lengths)
    ]
    plain, even = pack_all(rows, 1024), pack_all(rows, 1024, processes=processes)
    assert sorted(row.where for pack in even for row in pack.rows) == sorted(row.where for row in rows)
    assert max(len(pack.ids) for pack in even) <= 1024
    assert busiest(even, processes) <= busiest(plain, processes)
    alone = sum(len(pack.ids) for pack in plain)
    assert busiest(even, processes) < (1.25 if processes == 8 else 1.1) * alone / processes
    assert [pack.ids.tolist() for pack in pack_all(rows, 1024, processes=1)] == [pack.ids.tolist() for pack in plain]
    again = pack_all(rows, 1024, processes=processes)
    assert [pack.ids.tolist() for pack in again] == [pack.ids.tolist() for pack in even]


def test_packs_that_would_be_uneven_are_not_made():
    rows = [TokenRow([token] * 101, [100], f"row:{token}", 101) for token in range(12)]
    assert [len(pack.ids) for pack in pack_all(rows, 400)] == [400] * 3, "of which one of two processes has two"
    assert [len(pack.ids) for pack in pack_all(rows, 400, processes=2)] == [300] * 4
    assert [len(pack.ids) for pack in pack_all(rows, 150, processes=2)] == [100] * 12, "they do not fit otherwise"
    assert [len(pack.ids) for pack in pack_all(rows[:1], 400, processes=2)] == [100]


@pytest.mark.parametrize("shared", [0, 1, 7, 8, 9, 10, 12, 15])
def test_rows_that_begin_alike_take_so_many_tokens_together(shared):
    """Up to seven of the shared ones are counted twice, since a segment may not be worth it; so many fit, and no fewer."""
    ids = [[*[7] * shared, *range(10, 19)], [*[7] * shared, *range(30, 37)]]
    most = 2 * shared + 8 + 6 - max(0, shared - 7)  # without their last tokens, which predict nothing
    pair = [TokenRow(row, [shared + 1], "row:1", len(row), side) for row, side in zip(ids, ("chosen", "rejected"), strict=True)]
    assert largest_group_tokens(pair) == most
    assert len(pack_tree(pair).ids) <= most
    alone = [TokenRow(row, [shared + 1], f"row:{n}", len(row)) for n, row in enumerate(ids)]
    assert largest_group_tokens(alone) == shared + 8
    assert [len(pack_all(alone, limit)) for limit in (most, most - 1)] == [1, 2]
