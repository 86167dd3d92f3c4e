"""The learning rate at each step, against Transformers' schedulers; and what a run's length is."""

import math
from types import SimpleNamespace

import pytest
import torch
import transformers
from families import random_rows

from trimtab.core.errors import RecipeError
from trimtab.data.example import TokenRow
from trimtab.train import TrainConfig, TrainingSteps, learning_rate

STEPS = 40
ROWS = [TokenRow(ids, list(range(2, len(ids))), f"row:{n}", len(ids)) for n, ids in enumerate(random_rows(9, 7, 8, 6, 9))]


def theirs(name, warmup, **settings):
    """Transformers' rates for the steps 0, 1, 2 …, with a peak of 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = transformers.get_scheduler(name, optimizer, warmup, STEPS, scheduler_specific_kwargs=settings)
    rates = []
    for _ in range(STEPS + 1):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("warmup", [1, 5, 10])
@pytest.mark.parametrize(
    ("name", "settings", "schedule", "ours"),
    [
        ("cosine", {}, "cosine", {}),
        ("linear", {}, "linear", {}),
        ("constant_with_warmup", {}, "constant", {}),
        ("cosine_with_min_lr", {"min_lr_rate": 0.1}, "cosine", {"floor": 0.1}),
        ("warmup_stable_decay", {"num_decay_steps": 12}, "wsd", {"decay": 12}),
        ("warmup_stable_decay", {"num_decay_steps": 8}, "wsd", {}),  # 0.2 of 40
        ("inverse_sqrt", {}, "inverse_sqrt", {}),
    ],
)
def test_it_is_transformers_rate_but_that_the_first_step_is_not_lost(name, settings, schedule, ours, warmup):
    expected = theirs(name, warmup, **settings)
    rates = [learning_rate(step, STEPS, 1.0, warmup, schedule, **ours) for step in range(1, STEPS + 1)]
    assert rates[:warmup] == pytest.approx(expected[1 : warmup + 1])
    assert rates[warmup:] == pytest.approx(expected[warmup:STEPS])


@pytest.mark.parametrize(("schedule", "floor"), [("cosine", 0.25), ("linear", 0.25), ("wsd", 0.25)])
def test_a_floor_is_where_a_decay_would_end_after_the_last_step(schedule, floor):
    rates = [learning_rate(step, 1000, 2.0, 0.1, schedule, floor) for step in range(1, 1001)]
    assert min(rates[100:]) == rates[-1]
    assert floor * 2 < rates[-1] < floor * 2 + 0.02
    assert rates[100] == 2.0


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd", "inverse_sqrt"])
@pytest.mark.parametrize(
    ("steps", "warmup"), [(1, 0.0), (1, 0.5), (10, 0.0), (100, 0.05), (7, 7), (33, 0.3), (3, 1), (5, 0.01)]
)
def test_the_learning_rate_rises_to_its_peak_and_never_below_zero(schedule, steps, warmup):
    rates = [learning_rate(n, steps, 2.0, warmup, schedule) for n in range(1, steps + 1)]
    rising = warmup if isinstance(warmup, int) else round(warmup * steps)
    assert rates[:rising] == pytest.approx([2.0 * n / rising for n in range(1, rising + 1)])
    assert max(rates) == pytest.approx(2.0)
    assert all(rate > 0 for rate in rates)
    falling = rates[rising:]
    assert falling == sorted(falling, reverse=True)
    n = len(falling)
    if schedule == "constant":
        assert set(falling) <= {2.0}
    if schedule == "cosine":
        assert falling == pytest.approx([1 + math.cos(math.pi * k / n) for k in range(n)])
    if schedule == "linear":
        assert falling == pytest.approx([2 * (1 - k / n) for k in range(n)])


# How long a run is


def steps_of(rows=5, **settings):
    return TrainingSteps(ROWS[:rows], TrainConfig(**settings), SimpleNamespace(pack_tokens=64))


@pytest.mark.parametrize(
    ("settings", "steps", "epochs"),
    [
        ({"max_steps": 3, "rows_per_step": 2}, 3, 6 / 5),
        ({"max_steps": 30, "rows_per_step": 4}, 30, 24.0),  # alone it sets the length, up as well as down
        ({"max_steps": 1, "rows_per_step": 1}, 1, 0.2),
        ({"max_steps": 9, "rows_per_step": 2, "epochs": 2}, 5, 2.0),  # the epochs come first
        ({"max_steps": 4, "rows_per_step": 2, "epochs": 2}, 4, 8 / 5),
        ({"max_steps": 2, "tokens_per_step": 20}, 2, None),
    ],
)
def test_max_steps_is_the_length_alone_and_a_limit_beside_epochs(settings, steps, epochs):
    planned = steps_of(**settings)
    assert len(planned) == steps
    assert epochs is None or planned.epochs == pytest.approx(epochs)
    whole = steps_of(**{"epochs": 24} | {key: value for key, value in settings.items() if key not in ("max_steps", "epochs")})
    assert planned._indices == whole._indices[:steps] or settings.get("epochs") == 2  # the same steps, fewer of them


def test_the_seed_of_the_order_may_be_another():
    config = TrainConfig(rows_per_step=2)
    memory = SimpleNamespace(pack_tokens=64)
    orders = [TrainingSteps(ROWS[:5], config, memory, seed=seed)._indices for seed in (None, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"warmup": 11}, "warmup: 11 steps are more than the 10 of the run. Give fewer, or a fraction, such as 0.05."),
        (
            {"schedule": "wsd", "decay": 11},
            "decay: 11 steps are more than the 10 of the run. Give fewer, or a fraction, such as 0.05.",
        ),
        (
            {"schedule": "wsd", "decay": 6, "warmup": 0.5},
            "warmup and train.decay: 5 and 6 steps are more than the 10 of the run together.",
        ),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused(settings, problem):
    with pytest.raises(RecipeError) as refused:
        steps_of(max_steps=10, **settings)
    assert str(refused.value) == f"train.{problem}"
    assert len(steps_of(max_steps=12, **settings)) == 12
