"""Attention over trees, by each back end, against a softmax over all keys written out."""

import math
import re
from typing import NamedTuple

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


class Case(NamedTuple):
    segments: tuple[Segment, ...]
    heads: Heads
    virtual: int = 0
    window: int | None = None
    chunk: int | None = None
    rotary: int | None = None
    """All numbers of a head are rotated, unless given."""
    interleaved: bool = False
    sinks: bool = False
    softcap: float | None = None


CASES = {
    "rows side by side": Case(FLAT, Heads(2, 2, 16)),
    "a row alone": Case((Segment(0, 130, -1),), Heads(1, 3, 64)),
    "a tree": Case(TREE, Heads(2, 3, 20)),
    "virtual tokens": Case(TREE, Heads(1, 2, 8), 7),
    "a window": Case(TREE, Heads(2, 1, 24), 0, 33),
    "virtual tokens and a window": Case(TREE, Heads(1, 2, 128), 5, 33),
    "long segments that part": Case(FORKED, Heads(1, 2, 8), 3),
    "longer than a tile": Case(LONG, Heads(1, 2, 8)),
    "longer than a tile, with a window": Case(LONG, Heads(1, 1, 8), 0, 300),
    "heads rotated in part": Case(TREE, Heads(2, 1, 24), rotary=10),
    "heads not rotated": Case(TREE, Heads(2, 1, 24), rotary=0),
    "neighbours rotated": Case(TREE, Heads(2, 2, 16), rotary=12, interleaved=True),
    "sinks": Case(TREE, Heads(2, 3, 20), sinks=True),
    "sinks, virtual tokens and a window": Case(LONG, Heads(1, 2, 8), 5, 300, sinks=True),
    "chunks": Case(TREE, Heads(2, 1, 24), chunk=40),
    "chunks and virtual tokens": Case(LONG, Heads(1, 2, 8), 5, chunk=290),
}


def drawn(case, dtype=torch.float64):
    """q, k and v as columns of one matrix, angles, perhaps virtual keys and values and sinks; and a gradient."""
    groups, each, head = case.heads
    draw = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    tokens, widths = case.segments[-1].end, [groups * each * head, groups * head, groups * head]
    q, k, v = normal(tokens, sum(widths)).split(widths, dim=1)
    angles = torch.randn(tokens, (head if case.rotary is None else case.rotary) // 2, generator=draw, dtype=torch.float64)
    angles = angles.repeat_interleave(2, dim=1) if case.interleaved else angles.repeat(1, 2)
    first = {}
    if case.virtual:
        first = {name: normal(groups, case.virtual, head).requires_grad_() for name in ("virtual_k", "virtual_v")}
    if case.sinks:
        first["sinks"] = (normal(groups * each) + 2).requires_grad_()
    dout = normal(tokens, widths[0])
    return [t.clone().requires_grad_() for t in (q, k, v)], angles.cos().to(dtype), angles.sin().to(dtype), first, dout


def ours(case, q, k, v, cos, sin, first):
    segments, heads, virtual, window, chunk, _, interleaved, _, softcap = case
    plan = AttentionPlan(segments, heads, heads.size**-0.5, window, virtual, chunk, interleaved, softcap)
    return attend(AttentionInputs(q, k, v, cos, sin, **first), plan)


def written_out(case, q, k, v, cos, sin, first):
    segments, (_, each, head), virtual, window, chunk, _, interleaved, _, softcap = case
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
            before = 0 if window is None else max(0, last - window)
            if chunk is not None:
                before = max(before, (last - 1) // chunk * chunk)
            sees[token, keys[before:last]] = True

    def turned(x):
        heads, rotary = x.unflatten(1, (-1, head)), cos.shape[1]
        pairs = [(n, n + 1) for n in range(0, rotary, 2)] if interleaved else [(n, n + rotary // 2) for n in range(rotary // 2)]
        turned = list(heads.unbind(2))
        for one, two in pairs:
            (c, s), (a, b) = (t[:, None, one] for t in (cos, sin)), (turned[one], turned[two])
            turned[one], turned[two] = a * c - b * s, b * c + a * s
        return torch.stack(turned, dim=2)

    q, k, v = turned(q), turned(k).transpose(0, 1), v.unflatten(1, (-1, head)).transpose(0, 1)
    if virtual:
        k, v = torch.cat([first["virtual_k"], k], dim=1), torch.cat([first["virtual_v"], v], dim=1)
    k, v = (t.repeat_interleave(each, dim=0) for t in (k, v))
    scores = torch.einsum("thk,hsk->hts", q, k) / math.sqrt(head)
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~sees, float("-inf"))
    if "sinks" in first:
        scores = torch.cat([scores, first["sinks"][:, None, None].expand(-1, tokens, 1)], dim=2)
    return torch.einsum("hts,hsk->thk", scores.softmax(-1)[..., : virtual + tokens], v).flatten(1)


def differences(case, dtype=torch.float64, computed=None):
    """Of what comes out, and of each gradient, relative to the largest; of another case's than the reference, where one is given."""
    leaves, cos, sin, first, dout = drawn(case, dtype)
    out = ours(computed or case, *leaves, cos, sin, first)
    gradients = torch.autograd.grad(out, [*leaves, *first.values()], dout)
    exact = [t.detach().double().requires_grad_() for t in (*leaves, *first.values())]
    reference = written_out(case, *exact[:3], cos.double(), sin.double(), dict(zip(first, exact[3:], strict=True)))
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
        "the window is one too wide": ("place - window + 1", "place - window", "a window"),
        "a key after its chunk is seen": ("place - place % chunk", "place - place % chunk - 1", "chunks"),
        "a gradient from beyond the chunk": ("% v.chunk + v.chunk)", "% v.chunk + v.chunk - 1)", "chunks and virtual tokens"),
        "rotated back the wrong way": ("to, scale, -1)", "to, scale, 1)", "rows side by side"),
        "the rest of a head left out": ("i = t->rotary; i < t->head", "i = t->rotary; i < t->rotary", "heads rotated in part"),
        "neighbours rotated apart": ("two * cos[i + 1] + way * one", "two * cos[i + 1] - way * one", "neighbours rotated"),
        "a sink counts twice": ("total[i] = sinks ? 1 : 0", "total[i] = sinks ? 2 : 0", "sinks"),
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
