"""float16: small gradients do not vanish, overflows cost a second pass and no example, and the scale is part of the state."""

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from families import perturb, random_rows, tiny

from trimtab.artifacts import State
from trimtab.base import Base
from trimtab.core.errors import NonFinite
from trimtab.data import pack_flat
from trimtab.data.example import TokenRow
from trimtab.distributed.ddp import DDP
from trimtab.methods import attach
from trimtab.methods.lora import LoRA
from trimtab.objectives.sft import SFT
from trimtab.run import script as running
from trimtab.run.checkpoints import Progress
from trimtab.run.recipe import Recipe
from trimtab.train import LossScale, Optimizer, TrainConfig, loop, loss_scale, train

ROWS = [
    TokenRow(ids, list(range(2, len(ids))), f"row:{n}", len(ids)) for n, ids in enumerate(random_rows(9, 14, 8, 11, seed=1))
]
PACKS = [pack_flat(ROWS[:2]), pack_flat(ROWS[2:])]
FLAT = TrainConfig(schedule="constant", warmup=0.0)


def adapted(dtype, wide=False):
    """A model with weights of this dtype, perhaps held in float32."""
    model = tiny("llama", dtype)
    base = Base(model.float() if wide else model)
    adapter = attach(base.model, LoRA(rank=3))
    perturb(adapter.parameters(), 0.1)
    return base, adapter


def gradients(dtype, items, scale, wide=False):
    base, adapter = adapted(dtype, wide)
    adapter.train()
    passes = loop._Passes(base, SFT(), [PACKS], FLAT, None)
    passes.gradients(1, passes.sent.take(1), items, scale)
    found = [p.grad for p in adapter.parameters().values()]
    assert {g.dtype for g in found} == {torch.float32}
    scale.unscale_(found)
    return torch.cat([g.double().flatten() for g in found])


def test_small_gradients_vanish_in_float16_unless_the_loss_is_scaled():
    items = 50_000_000  # as of steps of so many tokens: gradients of 1e-8
    exact = gradients(torch.float16, items, LossScale(), wide=True)

    def off(scale):
        return float((gradients(torch.float16, items, scale) - exact).norm() / exact.norm())

    assert off(LossScale(loss_scale.FIRST)) < 0.01
    assert off(LossScale(None)) > 0.3


def test_scaling_and_unscaling_are_exact():
    plain, scaled = (gradients(torch.float32, 40, scale) for scale in (LossScale(None), LossScale(2.0**16)))
    assert torch.equal(plain, scaled)


def run(steps, first=loss_scale.FIRST, dtype=torch.float16, state=None):
    """Losses, what was scaled, and the parameters, after some steps; perhaps from a state."""
    base, adapter = adapted(dtype)
    optimizer = Optimizer(adapter, 0.0)
    if optimizer.loss_scale.value is not None:
        optimizer.loss_scale = LossScale(first)
    if state is not None:
        optimizer.load(*copy.deepcopy(state))
    made = list(train(base, adapter, SFT(), [PACKS] * steps, FLAT, 1e-2, optimizer=optimizer))
    after = optimizer.state(), optimizer.taken, optimizer.skipped, optimizer.loss_scale
    return made, after


def test_a_scale_that_is_too_large_costs_passes_and_neither_steps_nor_examples(monkeypatch):
    plain, _ = run(3)
    large, (_, taken, skipped, scale) = run(3, first=2.0**40)
    assert (taken, skipped) == (3, 0)
    assert 1 < large[0].loss_scale == large[2].loss_scale == scale.value < 2.0**40
    for one, other in zip(plain, large, strict=True):
        assert (one.items, one.tokens) == (other.items, other.tokens)
        assert one.loss == pytest.approx(other.loss, rel=1e-3)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-2)
    assert plain[0].values["loss_scale"] == loss_scale.FIRST
    monkeypatch.setattr(LossScale, "lower", lambda *_: False)  # as if it were not noticed
    with pytest.raises(NonFinite):
        run(3, first=2.0**40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_dtypes_are_not_scaled(dtype):
    steps, (*_, scale) = run(1, dtype=dtype)
    assert scale == LossScale(None, 0)
    assert "loss_scale" not in steps[0].values


def test_the_scale_grows_is_saved_and_goes_on_where_it_was(monkeypatch):
    monkeypatch.setattr(loss_scale, "STEPS", 3)
    first = 2.0**8
    whole, after = run(8, first)
    assert [step.loss_scale / first for step in whole] == [1, 1, 1, 2, 2, 2, 4, 4]
    _, halfway = run(4, first)
    rest, resumed = run(8, state=halfway)
    assert [step.number for step in rest] == [5, 6, 7, 8]
    assert resumed[1:] == after[1:]
    assert all(torch.equal(after[0][name], tensor) for name, tensor in resumed[0].items())
    forgotten, _ = run(8, state=halfway[:3])  # negative control
    assert [step.loss_scale for step in forgotten] != [step.loss_scale for step in rest]
    monkeypatch.setattr(loss_scale, "MOST", first)
    assert {step.loss_scale for step in run(4, first)[0]} == {first}


def test_what_no_scale_makes_finite_is_skipped_and_leaves_the_scale(monkeypatch):
    backward, calls = loop._Passes.gradients, []

    def broken(self, number, packs, items, scale):
        made = backward(self, number, packs, items, scale)
        calls.append((number, scale.value))
        if number == 2:
            optimizer.parameters[0].grad[0, 0] = float("nan")
        return made

    base, adapter = adapted(torch.float16)
    optimizer = Optimizer(adapter, 0.0)
    monkeypatch.setattr(loop._Passes, "gradients", broken)
    steps = list(train(base, adapter, SFT(), [PACKS] * 3, FLAT, 1e-2, optimizer=optimizer))
    assert [step.skipped is None for step in steps] == [True, False, True]
    assert [scale for number, scale in calls if number == 2] == [2.0**power for power in range(16, -1, -1)]
    assert (steps[2].loss_scale, optimizer.skipped) == (loss_scale.FIRST, 1)


def test_a_recipe_trains_in_float16_and_its_checkpoints_hold_the_scale(here):
    words = ["output=new", "train.epochs=0.5", "model.dtype=float16", "model.device=cpu"]
    kept = []
    save = running.Checkpointer.save

    def saved(self, *given):
        save(self, *given)
        kept.append(self.progress)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running.Checkpointer, "save", saved)
        running.run_recipe(Recipe.read(here / "r.yaml", words))
    assert kept
    for progress in kept:
        assert LossScale(**progress.loss_scale) == LossScale(loss_scale.FIRST, progress.last["step"])
        assert Progress(**dataclasses.asdict(progress)) == progress


def test_a_resumed_run_goes_on_with_the_saved_scale():
    base, adapter = adapted(torch.float16)
    saved_one = Optimizer(adapter, 0.0)
    saved_one.step(0.0)
    prepared = SimpleNamespace(base=base, adapter=adapter, recipe=SimpleNamespace(train=FLAT), engine=DDP())
    for saved, expected in (({"value": 2.0**9, "steps": 7}, LossScale(2.0**9, 7)), ({}, LossScale(loss_scale.FIRST))):
        facts = dataclasses.asdict(Progress(loss_scale=saved))
        optimizer, *_ = running._optimizer(prepared, State(4, saved_one.state(), facts))
        assert optimizer.loss_scale == expected
