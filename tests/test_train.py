"""The loop: one divisor, a schedule that is a function of the step, and no step on a number that is none."""

from types import SimpleNamespace

import pytest
import torch
from families import logprob_alone, perturb, random_rows, tiny

from trimtab.base import Base
from trimtab.core.errors import BaseChanged, DataError, NonFinite
from trimtab.data import pack_all, pack_flat
from trimtab.data.example import TokenRow
from trimtab.methods import attach
from trimtab.methods.lora import LoRA
from trimtab.objectives.sft import SFT
from trimtab.train import Optimizer, TrainConfig, TrainingSteps, train

ROWS = [
    TokenRow(ids, list(range(start, len(ids))), f"row:{n}", len(ids))
    for n, (ids, start) in enumerate(zip(random_rows(9, 14, 3, 11, 6, 8, 12, 5), (7, 2, 2, 1, 5, 3, 11, 4), strict=True))
]
FLAT = TrainConfig(schedule="constant", warmup=0.0, clip=None)


def adapted(dropout=0.0, dtype=torch.float32, seed=0):
    base = Base(tiny("llama", dtype))
    adapter = attach(base.model, LoRA(rank=3, dropout=dropout), seed=seed)
    perturb(adapter.parameters(), 0.1)
    return base, adapter


@pytest.mark.parametrize("cut", [[8], [4, 4], [1] * 8, [5, 1, 2], [1, 7]])
def test_a_step_does_not_depend_on_how_its_rows_are_cut_into_packs(cut):
    """A mean of per-pack means would weigh the rows of short packs more (A01 of the fault catalogue)."""
    states, losses = [], []
    for sizes in ([8], cut):
        base, adapter = adapted(dtype=torch.float64)
        ends = torch.tensor(sizes).cumsum(0).tolist()
        packs = [pack_flat(ROWS[end - size : end]) for end, size in zip(ends, sizes, strict=True)]
        (step,) = train(base, adapter, SFT(), [packs], FLAT, 1e-2)
        states.append(adapter.state())
        losses.append((step.loss, step.items, step.tokens, step.grad_norm))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for name, tensor in states[0].items():
        # Adam's first step is the gradient's sign: where that is all but zero, a rounding error decides.
        close = torch.isclose(states[1][name], tensor, rtol=1e-5, atol=1e-8)
        assert close.double().mean() > 0.999


def test_the_loss_and_the_first_step_are_those_of_the_plain_formula():
    """An independent reference: the model's own forward pass on each row, one mean, torch's AdamW."""
    base, adapter = adapted()
    reference_base, reference = adapted()
    (step,) = train(base, adapter, SFT(), [pack_all(ROWS, 20)], TrainConfig(warmup=0.0, schedule="constant", clip=0.5), 1e-2)
    learned = sum(len(row.target_indices) for row in ROWS)
    loss = -sum(logprob_alone(reference_base.model, row.ids, row.target_indices) for row in ROWS) / learned
    parameters = list(reference.parameters().values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(parameters, 0.5)
    optimizer.step()
    assert step.loss == pytest.approx(loss.item(), rel=1e-6)
    assert step.items == learned
    assert step.computed == sum(len(row.ids) - 1 for row in ROWS)
    assert step.grad_norm == pytest.approx(norm.item(), rel=1e-4)
    assert norm > 0.5
    for name, tensor in adapter.state().items():
        assert torch.isclose(tensor, reference.state()[name], rtol=1e-4, atol=1e-6).float().mean() > 0.999


def test_two_rates_are_those_of_torchs_groups_and_weights_decay_by_them():
    gradients, trained = random_rows(*[40] * 6), []
    for ours in (True, False):
        adapter = attach(Base(tiny("llama")).model, LoRA(rank=3, b_rate=16.0))
        perturb(adapter.parameters(), 0.1)
        named = adapter.parameters()
        if ours:
            optimizer = Optimizer(adapter, 0.1)
        else:
            by_factor = [[p for name, p in named.items() if name.endswith(f".{one}")] for one in "AB"]
            assert sum(map(len, by_factor)) == len(named)
            optimizer = torch.optim.AdamW(
                [{"params": by_factor[0]}, {"params": by_factor[1], "lr": 0.16}], lr=0.01, weight_decay=0.1
            )
        for one in gradients:
            for n, parameter in enumerate(named.values()):
                parameter.grad = torch.full_like(parameter, one[n % 40] - 10.0)
            optimizer.step(*[0.01] * ours)
        trained.append(adapter.state())
    for name, tensor in trained[0].items():
        torch.testing.assert_close(tensor, trained[1][name], rtol=1e-5, atol=1e-6)


def test_where_torch_has_no_fused_kernel_steps_are_the_same_and_a_state_goes_on_there(monkeypatch):
    values, state = [], None
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr(torch.optim.Adam, "__init__", refusing(torch.optim.Adam.__init__))
        adapter = attach(Base(tiny("llama")).model, LoRA(rank=3))
        perturb(adapter.parameters(), 0.1)
        optimizer = Optimizer(adapter, 0.1)
        assert bool(optimizer._parts[0].defaults["fused"]) is fused
        for step in range(4):
            if step == 2 and state is not None:
                optimizer.load(state, 2)
            for n, parameter in enumerate(adapter.parameters().values()):
                parameter.grad.fill_((n % 5 - 2) * (step + 1))
            optimizer.step(0.01)
            if step == 1:
                state = {name: tensor.clone() for name, tensor in optimizer.state().items()}
        values.append(adapter.state())
    for name, tensor in values[0].items():
        torch.testing.assert_close(tensor, values[1][name], rtol=1e-5, atol=1e-6)


def refusing(real):
    """As torch does on devices without a kernel."""

    def init(self, *args, fused=None, **others):
        if fused:
            raise RuntimeError("`fused=True` requires all the params to be floating point Tensors of supported devices")
        real(self, *args, **others)

    return init


def test_a_step_says_how_many_tokens_its_rows_have_and_how_many_it_computed():
    base, adapter = adapted()
    rows = [TokenRow([*range(3, 19), token], [16], f"row:{token}", 20) for token in (3, 4, 5)]
    (step,) = train(base, adapter, SFT(), [pack_all(rows, 64)], FLAT, 1e-2)
    assert (step.tokens, step.computed) == (60, 16)  # what the rows begin with is all that predicts anything


def test_it_learns_eight_rows_by_heart():
    base = Base(tiny("llama"))
    with torch.no_grad():
        base.model.lm_head.weight *= 5  # so that a normed hidden state can say "surely"
    adapter = attach(base.model, LoRA(rank=32))
    steps = list(train(base, adapter, SFT(), [pack_all(ROWS, 64)] * 200, TrainConfig(), 1e-2))
    assert steps[0].loss > 2
    assert steps[-1].loss < 0.05
    assert [step.number for step in steps] == list(range(1, 201))


def test_two_runs_are_equal_to_the_last_bit_with_dropout_whatever_happened_before():
    states = []
    for noise in (1, 2):
        base, adapter = adapted(dropout=0.3)
        torch.manual_seed(noise)
        list(train(base, adapter, SFT(), [pack_all(ROWS, 20)] * 3, TrainConfig(), 1e-2))
        states.append(adapter.state())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_dropout_differs_from_step_to_step_and_is_off_afterwards():
    base, adapter = adapted(dropout=0.5)
    losses = [step.loss for step in train(base, adapter, SFT(), [pack_all(ROWS, 64)] * 3, FLAT, 1e-12)]
    assert len(set(losses)) == 3
    assert not any(layer.training for layer in adapter.layers.values())


def test_nothing_of_a_steps_gradient_is_in_the_next_one():
    base, adapter = adapted()
    norms = [step.grad_norm for step in train(base, adapter, SFT(), [pack_all(ROWS, 20)] * 3, FLAT, 1e-12)]
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_gives_no_numbers_ends_the_run_with_the_adapter_as_it_was(value):
    base, adapter = adapted()
    steps = train(base, adapter, SFT(), [pack_all(ROWS[:2], 64), *[pack_all(ROWS[2:5], 64)] * 3], FLAT, 1e-2)
    next(steps)
    with torch.no_grad():
        base.model.lm_head.weight[5] = value
    before = adapter.state()
    assert [next(steps).skipped is not None, next(steps).skipped is not None] == [True, True]
    with pytest.raises(NonFinite) as caught:
        next(steps)
    assert str(caught.value).startswith(
        "Step 4: the loss is nan and the gradient norm nan, so the step was not taken. Its examples: row:"
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter.state().items())


def test_a_step_with_nothing_to_learn_is_refused():
    base, adapter = adapted()
    with pytest.raises(DataError, match="step 1: none of its examples has a target token"):
        next(train(base, adapter, SFT(), [[]], FLAT, 1e-2))


def test_a_base_that_changed_is_noticed():
    base, _ = adapted()
    assert base.fingerprint["weights"]
    base.check_unchanged()
    with torch.no_grad():
        base.model.model.norm.weight[0] += 1e-3
    with pytest.raises(BaseChanged, match="changed while they were in use"):
        base.check_unchanged()


def test_few_rows_are_learned_in_smaller_steps_and_more_often_unless_the_recipe_says_how():
    def of(rows, **settings):
        return TrainConfig(**settings).epochs_and_rows(rows)

    assert [of(rows) for rows in (1, 20, 40, 60, 200, 480, 1000)] == [(4, 4), (4, 4), (3, 4), (2, 4), (2, 6), (2, 16), (2, 16)]
    assert [of(rows, rows_per_step=8) for rows in (20, 60, 100, 1000)] == [(4, 8), (4, 8), (3, 8), (2, 8)]
    assert [of(rows, epochs=1) for rows in (20, 200, 1000)] == [(1, 4), (1, 4), (1, 16)]
    assert [of(20, tokens_per_step=100), of(20, epochs=9, rows_per_step=7)] == [(2, None), (9, 7)]


@pytest.mark.parametrize(
    ("settings", "steps", "rows"),
    [({}, 5, 4), ({"epochs": 1}, 2, 4), ({"rows_per_step": 1}, 20, 1), ({"tokens_per_step": 20}, 6, 5 / 3)],
)
def test_the_steps_of_a_run_are_as_many_as_that_makes(settings, steps, rows):
    planned = TrainingSteps(ROWS[:5], TrainConfig(**settings), SimpleNamespace(pack_tokens=64))
    assert (len(planned), planned.rows_per_step) == (steps, pytest.approx(rows))


@pytest.mark.parametrize(("settings", "repeats"), [({}, True), ({"epochs": 1.5}, True), ({"epochs": 1}, False)])
def test_what_is_learned_once_is_known_before_the_rows_are(settings, repeats):
    assert TrainConfig(**settings).keeps_frozen_outputs is repeats
