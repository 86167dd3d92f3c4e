"""Attention over trees, by each back end, against a softmax over all keys written out."""

import math
import re

import pytest
import torch

from trimtab.data.prefix_tree import Segment
from trimtab.engine.backends import AttentionInputs, AttentionPlan, Heads, cpu
from trimtab.engine.backends._compile import SOURCE, compile_library
from trimtab.engine.tree_attention import attend

FLAT = (Segment(0, 30, -1), Segment(30, 31, -1), Segment(31, 180, -1))
TREE = (
    Segment(0, 24, -1),
    Segment(24, 70, 0),
    Segment(70, 80, 1),
    Segment(80, 300, 0),
    Segment(300, 301, -1),
    Segment(301, 340, 4),
)
FORKED = (Segment(0, 520, -1), Segment(520, 1070, 0), Segment(1070, 1080, 0), Segment(1080, 1095, 1))
LONG = (Segment(0, 600, -1), Segment(600, 1200, 0))
CASES = {
    "rows side by side": (FLAT, Heads(2, 2, 16), 0, None),
    "a row alone": ((Segment(0, 130, -1),), Heads(1, 3, 64), 0, None),
    "a tree": (TREE, Heads(2, 3, 20), 0, None),
    "virtual tokens": (TREE, Heads(1, 2, 8), 7, None),
    "a window": (TREE, Heads(2, 1, 24), 0, 33),
    "virtual tokens and a window": (TREE, Heads(1, 2, 128), 5, 33),
    "long segments that part": (FORKED, Heads(1, 2, 8), 3, None),
    "longer than a tile": (LONG, Heads(1, 2, 8), 0, None),
    "longer than a tile, with a window": (LONG, Heads(1, 1, 8), 0, 300),
}


def drawn(case, dtype=torch.float64):
    """q, k and v as columns of one matrix, angles, perhaps virtual keys and values; and a gradient."""
    segments, (groups, each, head), virtual, _ = case
    draw = torch.Generator().manual_seed(0)
    tokens, widths = segments[-1].end, [groups * each * head, groups * head, groups * head]
    q, k, v = torch.randn(tokens, sum(widths), generator=draw, dtype=torch.float64).to(dtype).split(widths, dim=1)
    angles = torch.randn(tokens, head // 2, generator=draw, dtype=torch.float64).repeat(1, 2)
    first = (
        [torch.randn(groups, virtual, head, generator=draw, dtype=torch.float64).to(dtype) for _ in range(2)] if virtual else []
    )
    dout = torch.randn(tokens, widths[0], generator=draw, dtype=torch.float64).to(dtype)
    return [t.clone().requires_grad_() for t in (q, k, v)], angles.cos().to(dtype), angles.sin().to(dtype), [
        t.requires_grad_() for t in first
    ], dout  # fmt: skip


def ours(case, q, k, v, cos, sin, first):
    segments, heads, virtual, window = case
    return attend(AttentionInputs(q, k, v, cos, sin, *first), AttentionPlan(segments, heads, heads.size**-0.5, window, virtual))


def written_out(case, q, k, v, cos, sin, first):
    segments, (_, each, head), virtual, window = case
    tokens = len(q)
    sees = torch.zeros(tokens, virtual + tokens, dtype=torch.bool)
    for number, (start, end, _) in enumerate(segments):
        path, at = [], number
        while at >= 0:
            path = [*range(segments[at].start, segments[at].end), *path]
            at = segments[at].parent
        keys = torch.tensor([*range(virtual), *(virtual + t for t in path)])
        for token in range(start, end):
            last = len(keys) - (end - token) + 1
            sees[token, keys[0 if window is None else max(0, last - window) : last]] = True

    def turned(x):
        heads = x.unflatten(1, (-1, head))
        one, two = heads.chunk(2, dim=2)
        return heads * cos[:, None] + torch.cat([-two, one], 2) * sin[:, None]

    q, k, v = turned(q), turned(k).transpose(0, 1), v.unflatten(1, (-1, head)).transpose(0, 1)
    if first:
        k, v = torch.cat([first[0], k], dim=1), torch.cat([first[1], v], dim=1)
    k, v = (t.repeat_interleave(each, dim=0) for t in (k, v))
    scores = torch.einsum("thk,hsk->hts", q, k) / math.sqrt(head)
    return torch.einsum("hts,hsk->thk", scores.masked_fill(~sees, float("-inf")).softmax(-1), v).flatten(1)


def differences(case, dtype=torch.float64):
    """Of what comes out, and of each gradient, relative to the largest."""
    leaves, cos, sin, first, dout = drawn(case, dtype)
    out = ours(case, *leaves, cos, sin, first)
    gradients = torch.autograd.grad(out, [*leaves, *first], dout)
    exact = [t.detach().double().requires_grad_() for t in (*leaves, *first)]
    reference = written_out(case, *exact[:3], cos.double(), sin.double(), exact[3:])
    slopes = torch.autograd.grad(reference, exact, dout.double())
    pairs = zip((out, *gradients), (reference, *slopes), strict=True)
    return [float((a.double() - b).detach().abs().max() / b.detach().abs().max()) for a, b in pairs]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 5e-6)], ids=["float64", "float32"])
def test_it_is_a_softmax_over_what_is_seen(backend, case, dtype, tolerance):
    assert max(differences(case, dtype)) < tolerance


def test_a_long_segment_that_is_cut_wrongly_is_noticed(monkeypatch):
    right = cpu.split_long(FORKED, cpu.LONGEST)
    assert [s.end - s.start for s in right] == [260, 260, 275, 275, 10, 15]
    assert [s.parent for s in right] == [-1, 0, 1, 2, 1, 3]
    wrong = [s._replace(parent=0) if n == 2 else s for n, s in enumerate(right)]
    monkeypatch.setattr(cpu, "split_long", lambda *_: tuple(wrong))
    monkeypatch.setattr(cpu, "_arrays", cpu._arrays.__wrapped__)
    assert max(differences(CASES["long segments that part"])) > 1e-3


def test_a_gradient_whose_rows_are_not_side_by_side(backend):
    case = CASES["rows side by side"]
    (q, k, v), cos, sin, first, dout = drawn(case)
    out = ours(case, q, k, v, cos, sin, first)
    plain = torch.autograd.grad(out, [q, k, v], dout, retain_graph=True)
    strided = torch.autograd.grad(out, [q, k, v], torch.stack([dout, dout], dim=2)[..., 0])
    assert all(map(torch.equal, plain, strided))


@pytest.mark.skipif(cpu.load_library() is None, reason="no C compiler here")
@pytest.mark.parametrize("case", [CASES["a tree"], CASES["a row alone"]])
def test_the_same_bits_every_time_and_with_any_number_of_threads(case):
    leaves, cos, sin, first, dout = drawn(case, torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            found.append(torch.autograd.grad(ours(case, *leaves, cos, sin, first), leaves, dout))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_what_is_not_a_number_is_not_hidden(backend):
    case = CASES["rows side by side"]
    (q, k, v), cos, sin, first, _ = drawn(case)
    with torch.no_grad():
        k[40] = float("nan")
        out = ours(case, q, k, v, cos, sin, first)
    assert out[:40].isfinite().all()
    assert out[40:].isnan().any(dim=1).all()


def _mistakes():
    """Changes of attention.h, each of which some case has to notice."""
    return {
        "a later key is seen": ("v.at + query + 1 - v.tile", "v.at + query + 2 - v.tile", "rows side by side"),
        "the window is one too wide": ("v.at + query - v.window + 1", "v.at + query - v.window", "a window"),
        "rotated back the wrong way": ("head, scale, -1)", "head, scale, 1)", "rows side by side"),
        "a segment's gradient from itself alone": ("to = t->users[own + 1];", "to = from + 1;", "a tree"),
        "no virtual gradient from the last segment": ("to = t->segments;", "to = t->segments - 1;", "virtual tokens"),
        "sums of a tile that do not fade": ("total[i] * fade", "total[i]", "longer than a tile"),
        "what came out does not fade": ("c[i * wide + j] *= fade", "c[i * wide + j] *= 1", "longer than a tile"),
        "no balance": ("(ds[j] - even)", "ds[j]", "a row alone"),
    }


@pytest.mark.skipif(cpu.load_library() is None, reason="no C compiler here")
@pytest.mark.parametrize(("right", "wrong", "case"), _mistakes().values(), ids=_mistakes())
def test_a_mistake_in_the_compiled_code_is_noticed(right, wrong, case, tmp_path, monkeypatch):
    """Negative controls: the code is broken, compiled, and found out."""
    for path in SOURCE.parent.iterdir():
        text = path.read_text()
        if path.name == "attention.h":
            assert right in re.sub(r"\s+", " ", text), "this control breaks what is not there"
            text = re.sub(r"\s+".join(map(re.escape, right.split())), wrong, text)
        (tmp_path / path.name).write_text(text)
    broken = compile_library(tmp_path / "kernels.c", tmp_path, "-O1")
    assert broken is not None
    monkeypatch.setattr(cpu, "load_library", lambda: broken)
    assert not max(differences(CASES[case])) < 1e-13


@pytest.mark.skipif(cpu.load_library() is None, reason="no C compiler here")
def test_compiled_without_changes_the_controls_pass(tmp_path, monkeypatch):
    library = compile_library(SOURCE, tmp_path, "-O1")
    monkeypatch.setattr(cpu, "load_library", lambda: library)
    assert all(max(differences(CASES[case])) < 1e-13 for _, _, case in _mistakes().values())


def test_without_memory_it_says_what_to_do(monkeypatch):
    case = CASES["rows side by side"]
    (q, k, v), cos, sin, first, _ = drawn(case)
    if cpu.load_library() is None:
        pytest.skip("no C compiler here")
    monkeypatch.setattr(cpu, "_call", lambda *_: 1)
    with pytest.raises(MemoryError, match=r"no memory for attention over 180 tokens: lower train\.pack_tokens"):
        ours(case, q, k, v, cos, sin, first)


def test_every_layer_of_a_pass_asks_for_one_plan():
    cpu._arrays.cache_clear()
    for _ in range(3):
        cpu._arrays(TREE, 0)
    assert cpu._arrays.cache_info().misses == 1
