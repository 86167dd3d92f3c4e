"""KTO's mismatched answers: they have packs of their own, before those with a loss, and however all are packed the step is the same."""

import math
from dataclasses import replace

import pytest
import torch
from families import exact_norms, method_of, perturb, random_rows, tiny

from trimtab.base import Base
from trimtab.data import pack_all
from trimtab.data.example import TokenRow
from trimtab.data.mismatched import with_mismatched
from trimtab.engine import MemoryPlan
from trimtab.evaluate import score_loss
from trimtab.methods import Sample, attach
from trimtab.methods.lora import LoRA
from trimtab.objectives import KLEstimate, Objective
from trimtab.train import TrainConfig, train

FLAT = TrainConfig(schedule="constant", warmup=0.0, clip=None)
KTO = Objective.pick({"name": "kto", "beta": 0.3, "desirable": 1.5, "undesirable": 0.5})


def rows():
    """Prompts of 1 to 12 tokens, two of them the same, two that begin alike; answers that begin alike, too."""
    one, two, more = random_rows(12, 5, 7, seed=1)
    prompts = [one, one, one[:9] + two, *random_rows(1, 6, seed=2), more]
    answers = random_rows(4, 5, 9, 3, 6, 2, seed=3)
    answers[1] = answers[0][:2] + answers[1]
    made = [
        TokenRow(p + a, list(range(len(p), len(p + a))), f"row:{n}", len(p + a), "bad" if n % 3 else "good")
        for n, (p, a) in enumerate(zip(prompts, answers, strict=True))
    ]
    return [replace(row, reference=-30.0 - n) for n, row in enumerate(with_mismatched(made, 0))]


@pytest.mark.parametrize("limit", [1, 6, 24, 1000])
def test_they_have_the_first_packs_of_four_times_the_tokens(limit):
    apart = [row for row in rows() if row.side == "mismatched"]
    packs = pack_all(rows(), limit)
    mismatched = [pack.mismatched for pack in packs]
    assert mismatched == sorted(mismatched, reverse=True)
    assert sorted(row.ids for pack in packs for row in pack.rows) == sorted(row.ids for row in rows())
    assert all(len({row.side == "mismatched" for row in pack.rows}) == 1 for pack in packs)
    expected = [pack.ids.tolist() for pack in pack_all([replace(row, side=None) for row in apart], 4 * limit)]
    assert [pack.ids.tolist() for pack in packs if pack.mismatched] == expected


def step(method, family, limit, memory=None):
    base = Base(tiny(family, torch.float64))
    adapter = attach(base.model, method_of(method), sample=Sample(rows=random_rows(40, seed=5)))
    perturb(adapter.parameters(), 0.1)
    (done,) = train(base, adapter, KTO, [pack_all(rows(), limit)], FLAT, 1e-3, memory)
    return done, {name: p.detach().clone() for name, p in adapter.parameters().items()}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["lora", "prefix", "full"])
def test_a_step_is_the_same_however_rows_are_packed(method, family, monkeypatch, one_thread):
    exact_norms(monkeypatch)
    expected, values = step(method, family, 1000)
    assert expected.measures["kl"] > 0.1, "the estimate counts"
    recomputed = MemoryPlan(1, (), None, 1e6, math.inf, 0.0, "")
    for limit, memory in ((1, None), (24, None), (1, recomputed)):
        done, trained = step(method, family, limit, memory)
        assert done.loss == pytest.approx(expected.loss, rel=1e-9)
        assert done.grad_norm == pytest.approx(expected.grad_norm, rel=1e-6)
        assert done.measures == pytest.approx(expected.measures, rel=1e-6)
        assert (done.items, done.tokens) == (expected.items, expected.tokens)
        for name, value in values.items():
            torch.testing.assert_close(trained[name], value, rtol=0, atol=1e-7)


def test_the_estimate_is_known_before_the_first_loss(monkeypatch):
    """In whatever order the packs are; and the control: losses that are computed with an estimate of 0 are others."""
    base = Base(tiny("llama", torch.float64))
    adapter = attach(base.model, LoRA(rank=2))
    perturb(adapter.parameters(), 0.1)
    packs = pack_all(rows(), 24)
    (right,) = train(base, adapter, KTO, [packs], FLAT, 0.0)
    (turned,) = train(base, adapter, KTO, [packs[::-1]], FLAT, 0.0)
    assert right.loss == pytest.approx(turned.loss, rel=1e-12)
    monkeypatch.setattr(KLEstimate, "add", lambda *_: None)
    (wrong,) = train(base, adapter, KTO, [packs], FLAT, 0.0)
    assert right.loss != pytest.approx(wrong.loss, rel=1e-6)


def test_held_out_rows_are_scored_the_same():
    base = Base(tiny("llama", torch.float64))
    perturb(attach(base.model, method_of("lora")).parameters())
    expected = score_loss(base, rows(), 1000, KTO)
    for limit in (1, 24):
        scored = score_loss(base, rows(), limit, KTO)
        assert scored.loss == pytest.approx(expected.loss, rel=1e-6)
        assert scored.measures == pytest.approx(expected.measures, rel=1e-6)
        assert (scored.tokens, scored.rows) == (sum(len(r.target_indices) for r in rows()[::2]), 6)
