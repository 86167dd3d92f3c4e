"""Every objective is its formula, whatever packs its rows come in, and starts where it has to."""

import math
import random
from dataclasses import replace
from itertools import product

import pytest
import torch
from families import logprob_alone, perturb, random_rows, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import logsigmoid

from trimtab.base import Base
from trimtab.core.errors import DataError, RecipeError
from trimtab.data import pack_all, pack_flat, plan_steps, row_groups
from trimtab.data.example import TokenRow
from trimtab.data.mismatched import derangement, with_mismatched
from trimtab.engine import generate, pack_logprobs
from trimtab.evaluate import score_loss
from trimtab.methods import attach
from trimtab.methods.lora import LoRA
from trimtab.objectives import Objective, mean_measures, score_packs
from trimtab.objectives._base import TIE, correctness
from trimtab.objectives.sft import SFT
from trimtab.train import TrainConfig, train

SETTINGS = [
    {"name": "dpo"},
    {"name": "dpo", "beta": 0.3, "label_smoothing": 0.2},
    {"name": "dpo", "loss_type": "hinge", "beta": 0.5, "sft": 0.3},
    {"name": "dpo", "loss_type": "ipo", "beta": 0.2},
    {"name": "orpo", "weight": 0.4},
    {"name": "simpo", "beta": 2.5, "gamma": 0.7},
    {"name": "cpo", "beta": 0.2, "sft": 0.5},
    {"name": "kto", "beta": 0.3, "desirable": 1.5, "undesirable": 0.5},
]
NAMED = ["-".join(str(value) for value in one.values()) for one in SETTINGS]


def rows_of(kind, count=6, seed=0, sizes=(3, 9)):
    """Made-up rows of pairs, or of judged answers, two of which share a prompt."""
    draw = random.Random(seed)
    made = []
    for number in range(count):
        prompt = random_rows(4 if number < 2 else draw.randint(2, 6), seed=seed + (number if number != 1 else 0))[0]
        sides = (
            ("chosen", "rejected")
            if kind == "pairs"
            else (draw.choice(("good", "bad")) if number > 1 else ("good", "bad")[number],)
        )
        for n, side in enumerate(sides):
            answer = random_rows(draw.randint(*sizes), seed=100 * seed + 2 * number + n + 50)[0]
            ids = [*prompt, *answer]
            made.append(
                TokenRow(ids, list(range(len(prompt), len(ids))), f"row:{number}", len(ids), side, draw.uniform(-60, -20))
            )
    return made


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def by_hand(how, units_of_values, kl):
    """The mean loss, in plain Python: of each unit, its sequences as (log p, reference, tokens, side)."""
    losses = []
    for unit in units_of_values:
        if how["name"] == "kto":
            ((logp, reference, _, side),) = unit
            sign, weight = (1, how["desirable"]) if side == "good" else (-1, how["undesirable"])
            losses.append(weight * (1 - sigmoid(sign * how["beta"] * (logp - reference - kl))))
            continue
        (c, cr, cn, _), (r, rr, rn, _) = unit
        if how["name"] == "dpo":
            beta, kind, smooth = how.get("beta", 0.1), how.get("loss_type", "sigmoid"), how.get("label_smoothing", 0.0)
            margin = beta * ((c - cr) - (r - rr))
            if kind == "sigmoid":
                loss = -(1 - smooth) * math.log(sigmoid(margin)) - smooth * math.log(sigmoid(-margin))
            elif kind == "hinge":
                loss = max(0.0, 1 - margin)
            else:
                loss = ((c - cr) / cn - (r - rr) / rn - 1 / (2 * beta)) ** 2
            loss += how.get("sft", 0.0) * -c / cn
        elif how["name"] == "simpo":
            loss = -math.log(sigmoid(how["beta"] * (c / cn - r / rn) - how["gamma"]))
        elif how["name"] == "cpo":
            loss = -math.log(sigmoid(how["beta"] * (c - r))) - how["sft"] * c / cn
        else:
            odds = [math.log(math.exp(x) / (1 - math.exp(x))) for x in (c / cn, r / rn)]
            loss = -c / cn - how["weight"] * math.log(sigmoid(odds[0] - odds[1]))
        losses.append(loss)
    return sum(losses) / len(losses)


def kind_of(how):
    return Objective.member(how["name"]).data_kind


@pytest.mark.parametrize("how", SETTINGS, ids=NAMED)
def test_the_loss_is_the_formula(how):
    objective, rows = Objective.pick(how), rows_of(kind_of(how))
    draw, values = random.Random(3), {}
    for row in rows:
        values[id(row)] = draw.uniform(-60, -5) * (0.02 if how["name"] == "orpo" else 1)
    kl, total, items = 0.8 if how["name"] == "kto" else 0.0, 0.0, 0
    for pack in pack_all(rows, 30):
        logprobs = torch.tensor([values[id(row)] for row in pack.rows], dtype=torch.float64)
        total += float(objective.loss(logprobs, pack, kl))
        items += objective.items(pack)
    expected = by_hand(
        how,
        [
            [(values[id(rows[n])], rows[n].reference, len(rows[n].target_indices), rows[n].side) for n in unit]
            for unit in row_groups(rows)
        ],
        kl,
    )
    assert items == len(row_groups(rows))
    assert total / items == pytest.approx(expected, rel=1e-12)


def test_supervised_fine_tuning_is_the_mean_over_all_learned_tokens():
    rows = [replace(row, side=None) for row in rows_of("judged")]
    logprobs = [-3.0 * (number + 1) for number in range(len(rows))]
    pack = pack_flat(rows)
    summed = SFT().loss(torch.tensor([logprobs[rows.index(row)] for row in pack.rows]), pack, 0.0)
    assert SFT().items(pack) == sum(len(row.target_indices) for row in rows)
    assert float(summed) == pytest.approx(-sum(logprobs))


@pytest.mark.parametrize("how", SETTINGS, ids=NAMED)
def test_what_is_read_beside_the_loss_is_the_formula(how):
    objective, rows = Objective.pick(how), rows_of(kind_of(how))
    draw, pack = random.Random(5), pack_flat(rows)
    logprobs = [draw.uniform(-60, -5) for _ in pack.rows]
    found = objective.measures(torch.tensor(logprobs, dtype=torch.float64), pack, 0.8)
    rewards = {
        "dpo": lambda logp, row: how.get("beta", 0.1) * (logp - row.reference),
        "orpo": lambda logp, row: how["weight"] * logp / len(row.target_indices),
        "simpo": lambda logp, row: how["beta"] * logp / len(row.target_indices),
        "cpo": lambda logp, row: how["beta"] * logp,
        "kto": lambda logp, row: how["beta"] * (logp - row.reference),
    }
    expected = {}
    for logp, row in zip(logprobs, pack.rows, strict=True):
        reward = rewards[how["name"]](logp, row)
        expected.setdefault(f"{row.side}_reward", []).append(reward)
        expected.setdefault(f"{row.side}_logp", []).append(logp)
        if how["name"] == "kto":
            expected.setdefault("kl", []).append(0.8)
            expected.setdefault("accuracy", []).append(float((reward > how["beta"] * 0.8) == (row.side == "good")))
    if how["name"] != "kto":
        expected["margin"] = [c - r for c, r in zip(expected["chosen_reward"], expected["rejected_reward"], strict=True)]
        expected["accuracy"] = [float(margin > 0) for margin in expected["margin"]]
    assert {name: values.tolist() for name, values in found.items()} == {
        name: pytest.approx(values, rel=1e-12) for name, values in expected.items()
    }


def test_what_objectives_take_where_nothing_is_said():
    assert {name: Objective.pick(name).model_dump() for name in ("sft", "dpo", "orpo", "simpo", "cpo", "kto")} == {
        "sft": {"name": "sft"},
        "dpo": {"name": "dpo", "beta": 0.1, "loss_type": "sigmoid", "label_smoothing": 0.0, "sft": 0.0, "reference": "auto"},
        "orpo": {"name": "orpo", "weight": 0.1},
        "simpo": {"name": "simpo", "beta": 2.0, "gamma": 1.0},
        "cpo": {"name": "cpo", "beta": 0.1, "sft": 1.0},
        "kto": {"name": "kto", "beta": 0.1, "desirable": "auto", "undesirable": "auto", "reference": "auto"},
    }
    rates = {"sft": 1.0, "dpo": 0.1, "orpo": 0.5, "simpo": 0.1, "cpo": 0.1, "kto": 0.1}
    assert {name: Objective.member(name).lr_multiplier for name in rates} == rates


LIMITS = [1e-7, 0.0, -1e-9, -1e-7, -1e-4, -1.0, -30.0, -1e4]
"""Σ log p, from one that rounding has made positive to an answer that is impossible."""


def exactly(how, logprobs, rows, kl):
    """Loss and gradient in float64, by formulas that cancel nothing; of ORPO, 1 - p is at least 2^-24, and its slope too."""
    x = torch.tensor(logprobs, dtype=torch.float64, requires_grad=True)
    ratios = x - torch.tensor([row.reference for row in rows], dtype=torch.float64)
    means = x / torch.tensor([len(row.target_indices) for row in rows], dtype=torch.float64)
    if how["name"] == "kto":
        sign, weight = (1, how["desirable"]) if rows[0].side == "good" else (-1, how["undesirable"])
        loss = weight * torch.sigmoid(-sign * how["beta"] * (ratios[0] - kl))
    elif how["name"] == "orpo":
        absent = -torch.expm1(means)
        odds = means - (absent + (2.0**-24 - absent).clamp(min=0).detach()).log()
        loss = -means[0] - how["weight"] * logsigmoid(odds[0] - odds[1])
    else:
        margins = {
            "dpo": how.get("beta", 0.1) * (ratios[0] - ratios[1]),
            "simpo": how.get("beta", 1) * (means[0] - means[1]) - how.get("gamma", 0),
            "cpo": how.get("beta", 1) * (x[0] - x[1]),
        }
        margin, smooth = margins[how["name"]], how.get("label_smoothing", 0.0)
        loss = -(1 - smooth) * logsigmoid(margin) - smooth * logsigmoid(-margin)
        if how.get("loss_type") == "hinge":
            loss = torch.relu(1 - margin)
        if how.get("loss_type") == "ipo":
            by_token = [ratio / len(row.target_indices) for ratio, row in zip(ratios, rows, strict=True)]
            loss = (by_token[0] - by_token[1] - 1 / (2 * how["beta"])) ** 2
        loss = loss - how.get("sft", 0.0) * means[0]
    loss.backward()
    return loss.item(), x.grad.tolist()


@pytest.mark.parametrize("how", SETTINGS, ids=NAMED)
def test_losses_and_gradients_are_right_where_answers_are_impossible_or_certain(how):
    """In float32, against float64; margins of 1e4 either way are among them."""
    objective = Objective.pick(how)
    for reference in (0.0, -40.0):
        rows = [replace(row, reference=reference) for row in rows_of(kind_of(how), 2)]
        units_of = [rows[:1], rows[1:2]] if how["name"] == "kto" else [rows[:2]]
        for unit, kl, one, other in product(units_of, (0.0, 0.5), LIMITS, LIMITS):
            given = [one, other][: len(unit)]
            logprobs = torch.tensor(given, requires_grad=True)
            loss = objective.loss(logprobs, pack_flat(unit), kl)
            loss.backward()
            value, gradient = exactly(how, given, unit, kl)
            assert loss.item() == pytest.approx(value, rel=2e-5, abs=2e-6), (given, kl)
            assert logprobs.grad.tolist() == pytest.approx(gradient, rel=2e-4, abs=1e-30), (given, kl)


def test_orpo_of_a_certain_answer_is_its_limit():
    """For p -> 1 of the chosen one, -weight · odds of the rejected one is the slope that is left; it is not lost to the bound on 1 - p."""
    pack = pack_flat(rows_of("pairs", 1))
    tokens = [len(row.target_indices) for row in pack.rows]
    for other in (-0.01, -1.0, -30.0):
        logprobs = torch.tensor([0.0, other], requires_grad=True)
        Objective.pick({"name": "orpo", "weight": 0.4}).loss(logprobs, pack, 0.0).backward()
        p = math.exp(other / tokens[1])
        assert float(logprobs.grad[0]) * tokens[0] == pytest.approx(-1 - 0.4 * p / (1 - p), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", SETTINGS, ids=NAMED)
def test_an_answer_that_is_certain_does_not_break_a_step(how, dtype):
    """Rows whose log p rounds to 0, as it does for what is known by heart, in bases of every type."""
    model = tiny("llama", dtype)
    with torch.no_grad():
        model.lm_head.weight.mul_(120)
    base = Base(model)
    adapter = attach(base.model, LoRA(rank=3))
    prompts = random_rows(*[4] * 30)
    likely = [
        TokenRow([*prompt, *answer], [4, 5], "likely")
        for prompt, answer in zip(prompts, generate(base.model, prompts, [], max_new_tokens=2), strict=True)
    ]
    certain = [row for row, value in zip(likely, pack_logprobs(base.model, pack_flat(likely)), strict=True) if value == 0]
    others = [replace(row, ids=[*row.ids[:4], 5, 9]) for row in certain]
    rows = [certain[0], others[0], others[1], certain[1]]  # on either side
    sides = ("chosen", "rejected") if kind_of(how) == "pairs" else ("good", "bad")
    values = pack_logprobs(base.model, pack_flat(rows)).tolist()
    pack = pack_flat(
        replace(row, side=sides[number % 2], reference=value - 1)
        for number, (row, value) in enumerate(zip(rows, values, strict=True))
    )
    for taken in train(base, adapter, Objective.pick(how), [[pack]] * 4, FLAT, 1e-4):
        assert taken.skipped is None
        assert 0 < taken.grad_norm < 1e6
    assert all(p.isfinite().all() for p in adapter.parameters().values())


def adapted(seed=0):
    base = Base(tiny("gpt2", torch.float64))  # whose every operation is in float64
    adapter = attach(base.model, LoRA(rank=3), seed=seed)
    perturb(adapter.parameters(), 0.1)
    return base, adapter


FLAT = TrainConfig(schedule="constant", warmup=0.0, clip=None)


@pytest.mark.parametrize("how", SETTINGS, ids=NAMED)
def test_a_step_is_the_formulas_whatever_its_packs(how):
    """Against each row alone by the model's own forward pass; so micro-batches of one row are right too (I10, A18)."""
    rows = rows_of(kind_of(how))
    objective = Objective.pick(how)
    if objective.estimates_kl:
        rows = [replace(row, reference=-30.0 - n) for n, row in enumerate(with_mismatched(rows, 0))]
    results = []
    for limit in (1, 24, 1000):
        base, adapter = adapted()
        (step,) = train(base, adapter, objective, [pack_all(rows, limit)], FLAT, 1e-3)
        results.append((step, {name: p.grad for name, p in adapter.parameters().items()}))
    base, _ = adapted()
    values = {id(row): float(logprob_alone(base.model, row.ids, row.target_indices).detach()) for row in rows}
    learned = [[rows[n] for n in unit if rows[n].side != "mismatched"] for unit in row_groups(rows)]
    ratios = [values[id(row)] - row.reference for row in rows if row.side == "mismatched"]
    kl = max(0.0, sum(ratios) / len(ratios)) if ratios else 0.0
    assert kl > 0.1 or not objective.estimates_kl
    expected = by_hand(
        how, [[(values[id(r)], r.reference, len(r.target_indices), r.side) for r in unit] for unit in learned], kl
    )
    assert score_loss(base, rows, 24, objective).loss == pytest.approx(expected, rel=1e-6)  # and so is what is held out
    for step, _ in results:
        assert step.loss == pytest.approx(expected, rel=1e-6)
        assert step.items == len(learned)
        assert step.grad_norm == pytest.approx(results[0][0].grad_norm, rel=1e-6)
        assert step.measures == pytest.approx(results[0][0].measures, rel=1e-6)


@pytest.mark.parametrize("how", SETTINGS[:1] + SETTINGS[-1:], ids=["dpo", "kto"])
def test_the_gradient_is_the_formulas(how):
    """Autograd of the plain formula over rows alone, and what reaches the adapter in packs."""
    rows, objective = rows_of(kind_of(how)), Objective.pick(how)
    base, adapter = adapted()
    parameters = adapter.parameters()
    logp = {id(row): logprob_alone(base.model, row.ids, row.target_indices) for row in rows}
    if how["name"] == "dpo":
        margins = [
            0.1 * ((logp[id(c)] - c.reference) - (logp[id(r)] - r.reference))
            for c, r in zip(rows[::2], rows[1::2], strict=True)
        ]
        loss = -torch.stack([logsigmoid(margin) for margin in margins]).mean()
    else:
        weight = {"good": (1, 1.5), "bad": (-1, 0.5)}
        terms = [
            weight[row.side][1] * (1 - torch.sigmoid(weight[row.side][0] * 0.3 * (logp[id(row)] - row.reference)))
            for row in rows
        ]
        loss = torch.stack(terms).mean()
    expected = torch.autograd.grad(loss, list(parameters.values()))
    base, adapter = adapted()
    seen = {}
    for name, parameter in adapter.parameters().items():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: seen.__setitem__(name, p.grad.clone()))
    list(train(base, adapter, objective, [pack_all(rows, 24)], FLAT, 1e-3))
    for (name, _), gradient in zip(parameters.items(), expected, strict=True):
        torch.testing.assert_close(seen[name], gradient, rtol=1e-6, atol=1e-10)


def test_the_larger_a_margin_the_smaller_the_loss_and_the_sides_are_not_swapped():
    rows = rows_of("pairs", 1)
    pack = pack_flat(rows)
    for how in SETTINGS[:-1]:
        objective = Objective.pick(how)
        logprobs = torch.tensor([-9.0, -9.0], dtype=torch.float64, requires_grad=True)
        objective.loss(logprobs, pack, 0.0).backward()
        assert logprobs.grad[0] < 0
        if how["name"] != "dpo" or how.get("loss_type") != "ipo":
            assert logprobs.grad[1] > 0


# Mismatched answers


@pytest.mark.parametrize("count", range(2, 18))
def test_nobody_gets_the_own_answer_and_every_answer_is_used_once(count):
    for seed in range(4):
        givers = derangement([(n,) for n in range(count)], seed)
        assert sorted(givers) == list(range(count))
        assert all(giver != number for number, giver in enumerate(givers))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(prompts=st.lists(st.integers(0, 4), max_size=14), seed=st.integers(0, 3))
def test_nobody_gets_an_answer_to_an_equal_prompt_if_that_can_be(prompts, seed):
    givers = derangement([(p,) for p in prompts], seed)
    most = max(map(prompts.count, prompts), default=0)
    assert (givers is None) == (not prompts or 2 * most > len(prompts))
    if givers is not None:
        assert sorted(givers) == list(range(len(prompts)))
        assert all(prompts[giver] != prompts[number] for number, giver in enumerate(givers))


def test_one_prompt_alone_is_refused():
    rows = rows_of("judged", 6)
    with pytest.raises(DataError, match="have the same prompt"):
        with_mismatched(rows[:1], 0)
    with pytest.raises(DataError, match="have the same prompt"):
        with_mismatched(rows[:2], 0)  # which share theirs
    assert len(with_mismatched(rows, 0)) == 12


def test_mismatched_answers_are_another_rows_after_the_own_prompt():
    rows = rows_of("judged", 7)
    made = with_mismatched(rows, 1, max_length=9)
    answers = {tuple(row.ids[row.target_indices[0] :]) for row in rows}
    for row, other in zip(made[::2], made[1::2], strict=True):
        start = row.target_indices[0]
        assert row in rows
        assert other.ids[:start] == row.ids[:start]
        assert any(answer[: len(other.ids) - start] == tuple(other.ids[start:]) for answer in answers)
        assert other.ids[start:] != row.ids[start:]
        assert len(other.ids) <= 9
        assert (other.side, other.target_indices) == ("mismatched", list(range(start, len(other.ids))))


def test_the_pooled_number_is_the_whole_steps_and_no_gradient_goes_through_it():
    rows = [replace(row, reference=-25.0) for row in with_mismatched(rows_of("judged"), 0)]
    base, _ = adapted()
    objective = Objective.pick({"name": "kto", "desirable": 1.0, "undesirable": 1.0})
    kl = [score_packs(base.model, objective, pack_all(rows, limit))[1] for limit in (1, 30, 1000)]
    assert kl == pytest.approx([kl[0]] * 3, rel=1e-9)
    ratios = [
        float(logprob_alone(base.model, row.ids, row.target_indices).detach()) + 25.0
        for row in rows
        if row.side == "mismatched"
    ]
    assert kl[0] == pytest.approx(max(0.0, sum(ratios) / len(ratios)), rel=1e-6)


@pytest.mark.parametrize("how", SETTINGS[:-1], ids=NAMED[:-1])
def test_only_kto_pools_a_number(how):
    assert not Objective.pick(how).estimates_kl
    base, _ = adapted()
    assert score_packs(base.model, Objective.pick(how), pack_all(rows_of("pairs"), 30))[1] == 0.0


def test_ktos_weights_make_both_sides_count_the_same():
    rows = rows_of("judged", 9, seed=4)
    good = sum(row.side == "good" for row in rows)
    resolved = Objective.pick("kto").resolve_auto(rows)
    assert good * resolved.desirable == pytest.approx((9 - good) * resolved.undesirable)
    assert min(resolved.desirable, resolved.undesirable) == 1.0
    assert Objective.pick({"name": "kto", "desirable": 3.0}).resolve_auto(rows).desirable == 3.0
    with pytest.raises(DataError, match="0 bad ones"):
        Objective.pick("kto").resolve_auto([row for row in rows if row.side == "good"])


# Steps


def test_rows_are_counted_and_kept_whole():
    pairs = rows_of("pairs", 7)
    plan = plan_steps(pairs, epochs=2, seed=3, examples=3)
    assert [len(step) for step in plan] == [6, 6, 6, 6, 4]
    assert all(step[n] + 1 == step[n + 1] for step in plan for n in range(0, len(step), 2))
    judged = with_mismatched(rows_of("judged", 5), 0)
    assert [len(step) for step in plan_steps(judged, epochs=1, seed=0, examples=2)] == [4, 4, 2]
    assert [[n for n in step if n % 2] for step in plan_steps(judged, epochs=1, seed=0, tokens=25)]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    pairs=st.lists(
        st.tuples(
            st.integers(0, 2),
            st.integers(1, 9),
            st.lists(st.integers(0, 2), min_size=1, max_size=9),
            st.lists(st.integers(0, 2), min_size=1, max_size=9),
        ),
        max_size=8,
    ),
    limit=st.integers(1, 60),
)
def test_packs_never_part_a_pair_and_keep_to_their_limit(pairs, limit):
    rows = []
    for number, (kind, size, one, other) in enumerate(pairs):
        for side, answer in (("chosen", one), ("rejected", other)):
            ids = [*([kind + 5] * size), *answer]
            rows.append(TokenRow(ids, list(range(size, len(ids))), f"row:{number}", len(ids), side))
    packs = pack_all(rows, limit)
    assert sorted(row.where for pack in packs for row in pack.rows) == sorted(row.where for row in rows)
    for pack in packs:
        assert [row.side for row in pack.rows] == ["chosen", "rejected"] * (len(pack.rows) // 2)
        assert all(a.where == b.where for a, b in zip(pack.rows[::2], pack.rows[1::2], strict=True))
        assert len(pack.ids) <= limit or len(pack.rows) == 2


def test_measures_are_means_over_what_has_them():
    measured = [{"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([])}, {"a": torch.tensor([6.0]), "b": torch.tensor([4.0])}]
    assert mean_measures(measured) == {"a": 3.0, "b": 4.0}
    assert mean_measures([]) == {}


def test_settings_that_say_nothing_are_refused():
    for bad in (
        {"name": "dpo", "beta": 0},
        {"name": "dpo", "label_smoothing": 0.5},
        {"name": "dpo", "label_smoothing": 0.1, "loss_type": "ipo"},
        {"name": "kto", "desirable": -1},
        {"name": "dpo", "margin": 1},
    ):
        with pytest.raises((RecipeError, ValueError)):
            Objective.pick(bad)


def test_rewards_that_differ_by_rounding_are_neither_right_nor_wrong():
    margins = torch.tensor([1.0, TIE * 1.01, TIE, 0.0, -TIE, -TIE * 1.01, -1.0], dtype=torch.float64)
    assert correctness(margins).tolist() == [1.0, 1.0, 0.5, 0.5, 0.5, 0.0, 0.0]
