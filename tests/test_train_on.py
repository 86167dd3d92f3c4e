"""What is trained on: roles, everything, the last turn, and weights of messages; against plain PyTorch."""

import json
from dataclasses import replace

import pytest
import torch
from accelerators import cuda_backend
from chat_templates import NAMES, SCENARIOS, TOOLS, base
from families import logprob_alone, perturb, random_rows, tiny
from templates import FAMILIES, plain

from trimtab.base import Base
from trimtab.core.errors import RecipeError
from trimtab.data import SourceReport, TokenRow, pack_all, tokenize_answers, tokenize_examples
from trimtab.data.config import DataConfig
from trimtab.data.formats import read_examples
from trimtab.data.lengths import LengthLimit, limit_length
from trimtab.data.load import load_data
from trimtab.data.preference_formats import FORMATS
from trimtab.engine import pack_logprobs
from trimtab.evaluate import score_loss
from trimtab.methods import attach
from trimtab.methods.lora import LoRA
from trimtab.objectives.sft import SFT
from trimtab.run.recipe import Recipe
from trimtab.train import TrainConfig, train

SYSTEM, ONE, TWO = (
    {"role": "system", "content": "Be brief."},
    *(
        [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
        for q, a in (("One?", "First."), ("Two?", "Second."))
    ),
)
TALK = [SYSTEM, *ONE, *TWO]


def rows_of(messages, on, train_on="assistant", **columns):
    report = SourceReport(("rows",))
    row = messages if isinstance(messages, dict) else {"messages": messages, **columns}
    examples = read_examples([("rows:1", row)], {}, report, train_on=train_on)
    return tokenize_examples(examples, on, report), [reason for _, reason in report.rejected]


def runs(on, rows):
    """What is trained on, a text a run of targets, with the weight if it isn't 1."""
    found = []
    for row in rows:
        weights = dict(zip(row.target_indices, row.weights or [1.0] * len(row.target_indices), strict=True))
        start = None
        for t in range(len(row.ids) + 1):
            if weights.get(t) != (weights.get(start) if start is not None else None):
                if start is not None:
                    text, weight = on.tokenizer.decode(row.ids[start:t]), weights[start]
                    found.append(text if weight == 1 else (text, weight))
                start = t if t in weights else None
    return found


# What is trained on

CHATML = FAMILIES["chatml"].make()
END = "<|im_end|>"


@pytest.mark.parametrize(
    ("train_on", "expected"),
    [
        ("assistant", [f"First.{END}", f"Second.{END}"]),
        ("last", [f"Second.{END}"]),
        (("user",), [f"One?{END}", f"Two?{END}"]),
        (("assistant", "user"), [f"One?{END}", f"First.{END}", f"Two?{END}", f"Second.{END}"]),
        (("system", "assistant"), [f"Be brief.{END}", f"First.{END}", f"Second.{END}"]),
    ],
)
def test_turns_are_trained_on_to_the_token_that_ends_them(train_on, expected):
    rows, refused = rows_of(TALK, CHATML, train_on)
    assert (refused, len(rows)) == ([], 1)
    assert runs(CHATML, rows) == expected
    assert rows[0].weights is None


def test_everything_is_all_that_the_template_writes():
    (row,), _ = rows_of(TALK, CHATML, "everything")
    whole = CHATML.encode([CHATML.template.render(TALK)])[0].ids
    assert (row.ids, row.target_indices) == (whole, list(range(1, len(whole))))
    (row,), _ = rows_of({"prompt": "2+2?", "completion": " 4"}, plain(), "everything")
    assert row.target_indices == list(range(1, len(row.ids)))


@pytest.mark.parametrize(
    ("train_on", "expected"),
    [
        ("assistant", [f"Second.{END}"]), ("last", [f"Second.{END}"]), (("assistant",), [f"First.{END}", f"Second.{END}"]),
        (("user",), [f"One?{END}", f"Two?{END}"]),
    ],
)  # fmt: skip
def test_a_prompt_is_context_unless_roles_are_named(train_on, expected):
    rows, _ = rows_of({"prompt": TALK[:-1], "completion": TALK[-1:]}, CHATML, train_on)
    assert runs(CHATML, rows) == expected


def test_a_messages_own_weight_overrides_its_role():
    talk = [SYSTEM, {**ONE[0], "weight": 2}, {**ONE[1], "train": False}, TWO[0], {**TWO[1], "weight": 0.25, "loss": True}]
    rows, _ = rows_of(talk, CHATML)
    assert runs(CHATML, rows) == [(f"One?{END}", 2.0), (f"Second.{END}", 0.25)]
    (row,), _ = rows_of(talk, CHATML, "everything")
    of_text = dict(zip(row.target_indices, row.weights, strict=True))
    first, second = (runs(CHATML, [row]).index(one) for one in ((f"One?{END}", 2.0), (f"Second.{END}", 0.25)))
    assert first < second
    assert set(of_text.values()) == {1.0, 2.0, 0.25}
    assert f"First.{END}" not in "".join(run if isinstance(run, str) else run[0] for run in runs(CHATML, [row]))


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"weight": -1}, "weight is -1; it can be 0"),
        ({"weight": float("nan")}, "weight is nan"),
        ({"weight": float("inf")}, "weight is inf"),
        ({"weight": 1e-7}, "weight is 1e-07"),
        ({"weight": "0.5"}, "weight is '0.5'"),
        ({"loss": 0.5}, "loss is 0.5, not true or false"),
        ({"train": False, "loss": True}, "loss=true contradicts"),
        ({"weight": 0.5, "train": False}, "train=false contradicts"),
        ({"weight": 0}, "every assistant message has weight 0"),
    ],
)
def test_weights_that_say_nothing_clear_are_refused(message, reason):
    rows, (refused,) = rows_of([ONE[0], {**ONE[1], **message}], CHATML)
    assert not rows
    assert reason in refused


def test_nothing_to_train_on_says_why():
    for talk, train_on, reason in (
        (ONE[:1], "assistant", "no message is the assistant's"),
        (ONE, ("tool",), "no message is one of data.train_on (tool)"),
        ([*ONE[:1], {**ONE[1], "weight": 0}], "last", "the last assistant message has weight 0"),
    ):
        assert reason in rows_of(talk, CHATML, train_on)[1][0]
    rows, _ = rows_of(ONE[:1], CHATML, ("user",))
    assert runs(CHATML, rows) == [f"One?{END}"]


def test_what_is_evaluated_is_the_last_answer_whatever_is_trained_on():
    for train_on in ("assistant", "everything", ("user",), ("user", "assistant")):
        (example,) = read_examples([("rows:1", {"messages": TALK})], {}, SourceReport(("rows",)), train_on=train_on)
        ((prompt, answer),) = tokenize_answers([example], CHATML)
        assert prompt == CHATML.encode([CHATML.template.render(TALK[:-1], prompt=True)])[0].ids
        assert CHATML.tokenizer.decode(answer) == f"Second.{END}"


def test_compared_answers_have_no_weights_and_no_train_on():
    row = {"prompt": [ONE[0]], "chosen": [{**ONE[1], "weight": 0.5}], "rejected": [TWO[1]]}
    report = SourceReport(("rows",))
    assert not list(read_examples([("rows:1", row)], {}, report, FORMATS["pairs"]))
    assert "has weight 0.5; answers that are compared" in report.rejected[0].reason
    with pytest.raises(RecipeError, match=r"data\.train_on: dpo compares or judges answers"):
        Recipe.parse({"data": {"train": "x.jsonl", "train_on": "last"}, "objective": "dpo"})


@pytest.mark.parametrize("train_on", ["prompt", [], ["user", "bot"], 3, [["user"]]])
def test_what_is_no_role_is_refused(train_on):
    with pytest.raises(
        RecipeError, match=r"data\.train_on: expected assistant, last, everything, or a list of the roles system, user"
    ):
        Recipe.parse({"data": {"train": "x.jsonl", "train_on": train_on}})


# All of trl's templates


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scenario", ["several turns", "thinking in content", "call, result, answer"])
def test_other_roles_are_found_on_any_template_or_refused(name, scenario):
    on, messages = base(name), SCENARIOS[scenario]
    columns = {"tools": TOOLS} if "call" in scenario else {}
    alone, refused = rows_of(messages, on, **columns)
    if refused:
        return
    rows, refused = rows_of(messages, on, ("user", "tool", "assistant"), **columns)
    if refused:
        assert "can't be trained on" in refused[0]
        assert "data.train_on=everything" in refused[0]
    else:
        others = [message["content"] for message in messages if message["role"] in ("user", "tool")]
        answers = runs(on, alone)
        assert [run for run in runs(on, rows) if run in answers] == answers
        assert len(rows) == len(alone)
        found = [run for run in runs(on, rows) if run not in answers]
        assert len(found) == len(others)
        for text, run in zip(others, found, strict=True):
            assert run.startswith(text)
            assert sum(run.count(token) for token in on.control_tokens) <= 1
    whole, refused = rows_of(messages, on, "everything", **columns)
    assert refused == []
    assert len(whole) == 1
    assert whole[0].target_indices == list(range(1, len(whole[0].ids)))


# Weights in the loss


def weighted_rows():
    """Rows of which some share a prompt, some have weights, and one has all of weight 1."""
    prompt, *answers = random_rows(7, 4, 5, 6, 3, seed=3)
    weights = [[0.5] * 4, None, [2.0, 2.0, 0.25, 1.0, 1.0, 3.0], [0.125] * 3]
    return [
        TokenRow(prompt + answer, list(range(7, 7 + len(answer))), f"row:{n}", 7 + len(answer), weights=weight)
        for n, (answer, weight) in enumerate(zip(answers, weights, strict=True))
    ]


def plain_loss(model, rows):
    """Σ w · cross entropy / Σ w by the model's own forward pass, a row at a time."""
    total, divisor = 0.0, 0.0
    for row in rows:
        logits = model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0]
        at = torch.tensor(row.target_indices)
        losses = torch.nn.functional.cross_entropy(logits[at - 1], torch.tensor(row.ids)[at], reduction="none")
        weights = torch.tensor(row.weights or [1.0] * len(at), dtype=losses.dtype)
        total, divisor = total + (losses * weights).sum(), divisor + weights.sum()
    return total / divisor


@pytest.mark.parametrize("split", [False, True], ids=["a part of the vocabulary at a time", "whole rows of logits"])
@pytest.mark.parametrize("targets", [("q_proj", "down_proj"), ("q_proj", "lm_head")], ids=["frozen head", "adapted head"])
def test_the_loss_and_its_gradient_are_those_of_weighted_cross_entropy(targets, split):
    model = tiny("llama").double()
    adapter = attach(model, LoRA(rank=2, targets=targets))
    perturb(adapter.parameters(), 0.1)
    parameters, rows = list(adapter.parameters().values()), weighted_rows()
    expected = plain_loss(model, rows)
    gradients = torch.autograd.grad(expected, parameters)
    for tokens in (8, 24, 1000):
        packs = pack_all(rows, tokens)
        with cuda_backend() if split else torch.enable_grad():
            loss = sum(SFT().loss(pack_logprobs(model, pack), pack, 0.0) for pack in packs) / sum(map(SFT().items, packs))
            ours = torch.autograd.grad(loss, parameters)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-7)  # the norms of the model itself are computed in float32
        for one, other in zip(ours, gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    unweighted = plain_loss(model, [replace(row, weights=None) for row in rows])
    assert abs(unweighted.item() - expected.item()) > 1e-3  # the control


def test_a_step_and_an_evaluation_divide_by_the_weights():
    base = Base(tiny("llama"))
    adapter = attach(base.model, LoRA(rank=2))
    rows = weighted_rows()
    expected = plain_loss(base.model, rows).item()
    scored = score_loss(base, rows)
    config = TrainConfig(schedule="constant", warmup=0.0)
    (step,) = train(base, adapter, SFT(), [pack_all(rows, 12)], config, 1e-3)
    assert step.loss == pytest.approx(expected, rel=1e-5)
    assert step.items == sum(row.total_weight for row in rows) == 2 + 5 + 9.25 + 0.375
    assert scored.loss == pytest.approx(expected, rel=1e-5)
    assert scored.tokens == 18


def test_weights_of_1_change_no_bit():
    model, rows = tiny("llama"), weighted_rows()
    adapter = attach(model, LoRA(rank=2))
    perturb(adapter.parameters(), 0.1)
    found = []
    for weight in (None, 1.0):
        same = [replace(row, weights=weight and [weight] * len(row.target_indices)) for row in rows]
        (pack,) = pack_all(same, 1000)
        loss = SFT().loss(pack_logprobs(model, pack), pack, 0.0) / SFT().items(pack)
        found.append([loss, *torch.autograd.grad(loss, list(adapter.parameters().values()))])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    alone = logprob_alone(model, rows[1].ids, rows[1].target_indices)
    assert pack_logprobs(model, pack_all(rows[1:2], 99)[0]).item() == pytest.approx(alone.item(), rel=1e-5)


def test_weights_are_kept_with_the_tokens_and_are_part_of_the_digest(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("trimtab.data.token_cache.MIN_BYTES", 0)

    def load(weight, train_on="assistant"):
        lines = [{"messages": [*ONE, TWO[0], {**TWO[1], "weight": weight}]}, {"messages": TALK}]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return load_data(DataConfig(train=str(tmp_path / "rows.jsonl"), eval=0, train_on=train_on), CHATML, 1000, 0)

    first = load(0.5)
    assert [row.weights and sorted(set(row.weights)) for row in first.train] == [[0.5, 1.0], None]
    monkeypatch.setattr("trimtab.data.load.tokenize_examples", None)  # from here on, tokens are those that were kept
    again = load(0.5)
    assert (again.train, again.digest) == (first.train, first.digest)
    monkeypatch.undo()
    assert len({first.digest, load(0.25).digest, load(0.5, "last").digest, load(1).digest}) == 4
    assert [row.weights for row in load(1).train] == [None, None]


def test_truncated_rows_keep_the_weights_of_what_is_left():
    (row,), _ = rows_of([*ONE, TWO[0], {**TWO[1], "weight": 0.5}], CHATML)
    (cut,) = limit_length([row], LengthLimit(len(row.ids) - 2, "truncate"))
    kept = len(cut.target_indices)
    assert (cut.target_indices, cut.weights) == (row.target_indices[:kept], row.weights[:kept])
    assert kept == len(row.target_indices) - 2
