"""FlexAttention over trees: who sees whom, by blocks and by pairs, against paths written out; and attention, without compiling it."""

import random

import numpy as np
import pytest
import torch
from accelerators import cuda_backend
from test_tree_attention import CASES, differences
from torch.nn.attention import flex_attention as pytorch

from trimtab.data.prefix_tree import Segment, lay_out, paths_of
from trimtab.engine.backends import AttentionPlan, Heads, flex, probing, ways

HEADS = Heads(1, 1, 8)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(flex, "BLOCK", 8)
    monkeypatch.setattr(flex, "SIZES", (64, 128, 256, 512))


def random_plans():
    rng = random.Random(0)
    for _ in range(20):
        heads = [[rng.randrange(3) for _ in range(rng.randrange(8, 30))] for _ in range(3)]
        rows = []
        for _ in range(rng.randrange(1, 6)):
            head = rng.choice(heads)
            rows.append(head[: rng.randrange(1, len(head) + 1)] + [rng.randrange(5) for _ in range(rng.randrange(1, 25))])
        window, chunk = rng.choice([None, 1, 7, 20]), rng.choice([None, None, 9])
        yield AttentionPlan(lay_out(rows).segments, HEADS, 1.0, window, rng.choice([0, 0, 3, 11]), chunk)


def seen_by_paths(plan):
    """T P + T."""
    tokens = plan.segments[-1].end
    seen = np.zeros((tokens, plan.virtual + tokens), bool)
    for (start, end, _), path in zip(plan.segments, paths_of(plan.segments), strict=True):
        keys = [*range(plan.virtual), *(plan.virtual + t for n in path for t in range(*plan.segments[n][:2]))]
        for token in range(start, end):
            place = len(keys) - (end - token)
            first = 0 if plan.window is None else max(0, place - plan.window + 1)
            first = first if plan.chunk is None else max(first, place // plan.chunk * plan.chunk)
            seen[token, keys[first : place + 1]] = True
    return seen


def seen_by(sight):
    """N M."""
    q, k = np.arange(len(sight.last))[:, None], np.arange(len(sight.reach))
    return (k <= sight.last[:, None]) & (q < sight.reach) & (sight.place >= sight.first[:, None])


def wrong(plan, sight):
    """How many pairs of tokens, and of blocks, are not as the paths say."""
    tokens, keys, seen = plan.segments[-1].end, plan.virtual + plan.segments[-1].end, seen_by(sight)
    some, whole = flex.blocks_of(sight)
    blocks = seen.reshape(len(some), flex.BLOCK, some.shape[1], flex.BLOCK)
    pairs = int((seen[:tokens, :keys] != seen_by_paths(plan)).sum()) + int(seen[:tokens, keys:].sum())
    pairs += int((~seen[range(tokens, len(seen)), range(keys, plan.virtual + len(seen))]).sum())  # padding sees itself
    return pairs, int((blocks.any((1, 3)) & ~some).sum()) + int((whole & ~blocks.all((1, 3))).sum())


def test_four_numbers_say_who_sees_whom(small):
    for plan in random_plans():
        sight = flex.sight_of(plan)
        assert flex.takes(plan)
        assert wrong(plan, sight) == (0, 0)
        some, whole = flex.blocks_of(sight)
        seen = seen_by(sight).reshape(len(some), 8, some.shape[1], 8)
        if plan.window is plan.chunk is None and not plan.virtual:  # then they are no more than is needed
            assert np.array_equal(some, seen.any((1, 3)))
            assert np.array_equal(whole, seen.all((1, 3)))


@pytest.mark.parametrize("name", ["last", "first", "reach", "place"])
def test_one_number_that_is_off_by_one_is_noticed(small, name):
    plan = AttentionPlan(CASES["a tree"].segments, HEADS, 1.0, 33, 5)
    right = flex.sight_of(plan)
    assert wrong(plan, right)[0] == 0
    assert wrong(plan, right._replace(**{name: getattr(right, name) + 1}))[0] > 0


def test_trees_that_are_not_depth_first_are_not_taken():
    apart = (Segment(0, 9, -1), Segment(9, 20, -1), Segment(20, 30, 0))
    assert not flex.takes(AttentionPlan(apart, HEADS, 1.0))
    assert flex.takes(AttentionPlan((apart[0], Segment(9, 20, 0), Segment(20, 30, 1), Segment(30, 40, 0)), HEADS, 1.0))
    assert not flex.takes(AttentionPlan((Segment(0, flex.SIZES[-1] + 1, -1),), HEADS, 1.0))


@pytest.fixture
def eager(monkeypatch):
    """FlexAttention as plain operations, with gradients on CPUs, in the place of what would be compiled."""
    monkeypatch.setattr(pytorch, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True, raising=False)
    monkeypatch.setattr(pytorch, "_validate_device", lambda *_: None, raising=False)
    monkeypatch.setattr(flex, "_flex_attention", lambda: pytorch.flex_attention)
    monkeypatch.setattr(flex, "SIZES", (384, 1280))
    by = next(way for way in ways.WAYS if way.name == "FlexAttention")
    monkeypatch.setattr(ways, "WAYS", (by._replace(takes=lambda q, plan, sinks: flex.takes(plan)), ways.WAYS[-1]))
    monkeypatch.setattr(probing, "_probes", {})
    monkeypatch.setattr(probing, "_said", set())
    flex._block_mask.cache_clear()
    with cuda_backend():
        yield
    flex._block_mask.cache_clear()


@pytest.mark.parametrize(
    ("name", "softcap"),
    [("a tree", None), ("a window", 1.5), ("virtual tokens", 1.5), ("chunks", None), ("neighbours rotated", 1.5)],
)
def test_it_is_a_softmax_over_what_is_seen(eager, name, softcap):
    case = CASES[name]._replace(softcap=softcap, heads=CASES[name].heads._replace(size=16))  # older versions take powers of two
    assert max(differences(case)) < 1e-13


def test_in_bfloat16(eager):
    assert max(differences(CASES["virtual tokens"]._replace(softcap=1.5), torch.bfloat16)) < 0.02


@pytest.mark.parametrize("what", ["sight_of", "_cap"])
def test_what_is_wrong_fails_the_probe(eager, monkeypatch, what):
    sight = flex.sight_of
    wrong = {
        "sight_of": lambda plan: (s := sight(plan))._replace(last=s.last + 1),
        "_cap": lambda softcap: lambda score, b, h, q, k: softcap * torch.tanh(score / (softcap + 0.1)),
    }
    monkeypatch.setattr(flex, what, wrong[what])
    with pytest.warns(RuntimeWarning, match="FlexAttention: not used here"):
        assert max(differences(CASES["virtual tokens"]._replace(softcap=1.5))) < 1e-13


def test_a_mask_is_made_without_waiting_for_the_device():
    plan = AttentionPlan(CASES["a tree"].segments, HEADS, 1.0, 33, 5)
    mask, lengths = flex._block_mask(plan, torch.device("meta"))
    assert lengths == (1024, 1152)
    assert mask.kv_indices.is_meta
    assert flex._block_mask(plan._replace(virtual=0), torch.device("meta"))[1] == lengths  # compiled once for both
