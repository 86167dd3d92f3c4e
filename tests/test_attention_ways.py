"""Attention over trees by each way that accelerators have: all give what a softmax over all keys gives."""

import pytest
import torch
from accelerators import cuda_backend
from test_tree_attention import CASES, differences, drawn, ours

from trimtab.engine.backends import segments

SMALL = [
    "a row alone", "a tree", "virtual tokens and a window", "neighbours rotated", "sinks, virtual tokens and a window",
    "chunks and virtual tokens",
]  # fmt: skip


@pytest.fixture
def recomputing(monkeypatch):
    monkeypatch.setattr(segments, "_way", lambda q: segments._RECOMPUTING)


@pytest.mark.parametrize("name", SMALL)
def test_a_loop_of_calls(recomputing, name):
    with cuda_backend():
        assert max(differences(CASES[name])) < 1e-13


def test_a_loop_of_calls_that_sees_a_later_key_is_noticed(recomputing, monkeypatch):
    right = segments.is_seen
    monkeypatch.setattr(segments, "is_seen", lambda q, k, rules: right(q + 1, k, rules))
    with cuda_backend():
        assert max(differences(CASES["a tree"])) > 1e-3


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.02), (torch.float16, 0.002)], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["a tree", "virtual tokens and a window", "sinks"])
def test_in_few_bits(name, dtype, tolerance):
    with cuda_backend():
        assert max(differences(CASES[name], dtype)) < tolerance


@pytest.mark.parametrize("name", SMALL)
def test_nothing_waits_for_the_device(name):
    """On `meta` there are no numbers to read."""
    leaves, cos, sin, first, dout = drawn(CASES[name], torch.bfloat16)
    leaves, first = (
        [t.detach().to("meta").requires_grad_() for t in leaves],
        {n: t.detach().to("meta") for n, t in first.items()},
    )
    with cuda_backend():
        out = ours(CASES[name], *leaves, cos.to("meta"), sin.to("meta"), first)
        gradients = torch.autograd.grad(out, leaves, dout.to("meta"))
    assert [t.shape for t in gradients] == [t.shape for t in leaves]
    assert all(t.dtype == torch.bfloat16 for t in (out, *gradients))
