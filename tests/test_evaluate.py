"""Scores: what they are, how sure they are, and that a right answer is never cut off."""

import io
import math
import random

import pytest
import torch
from families import logprob_alone
from rich.console import Console
from templates import CHATML, base_of, bytes_tokenizer

from trimtab.core.errors import DataError, NonFinite
from trimtab.data import Conversation, Judged, Preference, SourceReport, Text, tokenize_examples, tokenize_prompt
from trimtab.engine import Answer, generate
from trimtab.evaluate import answer_preferences, score, score_answers, score_loss, wilson_interval
from trimtab.evaluate.intervals import bootstrap
from trimtab.report.scores import scores_table


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    return base_of(bytes_tokenizer(("<|endoftext|>", "<|im_start|>", "<|im_end|>")), CHATML, eos_token="<|im_end|>")


def asked(question, answer, where="rows:1"):
    return Conversation(({"role": "user", "content": question}, {"role": "assistant", "content": answer}), where)


def own_answer(base, question, tokens):
    """What this (random) model says of itself, so that a right answer to a question is known."""
    ids = tokenize_prompt([{"role": "user", "content": question}], base)
    return base.decode(generate(base.model, [ids], base.stop_ids, max_new_tokens=tokens)[0])


@pytest.mark.parametrize(
    ("hits", "of", "low", "high"),
    [
        (8, 10, 0.4902, 0.9433),
        (0, 100, 0.0, 0.0370),
        (100, 100, 0.9630, 1.0),
        (1, 2, 0.0945, 0.9055),
        (81, 263, 0.2553, 0.3662),
    ],
)
def test_wilsons_interval_has_the_published_values(hits, of, low, high):
    """The last row is Newcombe's example (1998, Statistics in Medicine 17:857-872, table I, method 3)."""
    assert wilson_interval(hits, of) == pytest.approx((low, high), abs=1e-4)


def test_the_bootstrap_covers_the_mean_and_narrows_with_more_rows():
    sums, counts = [float(n % 7) * 3 for n in range(60)], [3] * 60
    low, high = bootstrap(sums, counts)
    mean = sum(sums) / sum(counts)
    assert low < mean < high
    error = math.sqrt(sum((s / 3 - mean) ** 2 for s in sums) / 60 / 60)
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.15)  # the normal approximation, by hand
    more = bootstrap(sums * 16, counts * 16)
    assert (more[1] - more[0]) == pytest.approx((high - low) / 4, rel=0.25)
    assert bootstrap(sums, counts) == (low, high)


@pytest.mark.parametrize("rows", [1, 7, 60])
def test_the_bootstrap_is_the_plain_one(rows):
    """The percentile bootstrap over rows, with the draws of random.Random(0): intervals of earlier runs come out again."""
    draw = random.Random(rows)
    sums, counts = [draw.uniform(0, 9) for _ in range(rows)], [draw.randint(1, 30) for _ in range(rows)]
    generator, means = random.Random(0), []
    for _ in range(1000):
        chosen = generator.choices(range(rows), k=rows)
        means.append(sum(sums[n] for n in chosen) / sum(counts[n] for n in chosen))
    means.sort()
    assert bootstrap(sums, counts) == pytest.approx((means[25], means[974]), rel=1e-12)


def test_the_loss_is_the_mean_over_all_learned_tokens(base):
    rows = tokenize_examples([asked("Hello", "the answer is 4"), asked("What?", "x")], base, SourceReport(("rows",)))
    scored = score_loss(base, rows, pack_tokens=16)
    expected = -sum(logprob_alone(base.model, row.ids, row.target_indices) for row in rows) / sum(
        len(row.target_indices) for row in rows
    )
    assert scored.loss == pytest.approx(float(expected), rel=1e-5)
    assert (scored.rows, scored.tokens) == (2, sum(len(row.target_indices) for row in rows))
    assert scored.perplexity == pytest.approx(math.exp(scored.loss))


def test_an_answer_is_right_if_it_is_the_expected_one_but_for_white_space_around_it(base):
    said = own_answer(base, "Hello", 400)
    right, padded, wrong = score_answers(
        base, [asked("Hello", said), asked("Hello", f"  {said}\n"), asked("Hello", said + "!")]
    )
    # A random model never stops; what it says up to the limit is longer than what was expected.
    assert right.ended == "length"
    assert right.answer.startswith(said[:20])
    assert (right.expected, padded.expected.strip(), wrong.expected) == (said, said.strip(), said + "!")
    for answer in (right, padded, wrong):
        assert answer.correct == (answer.answer.strip() == answer.expected.strip())


def test_a_right_answer_that_stops_is_counted_and_never_cut(base, monkeypatch):
    """Generation stands still here: it gives the expected answer as the tokenizer writes it, then stops."""
    expected = ["the answer is Paris.", "4", "a much longer answer of many words, " * 5]
    examples = [asked(f"Question {n}", answer) for n, answer in enumerate(expected)]
    limits = []

    def perfect(_model, prompts, _stops, *, max_new_tokens, **_others):
        limits.append(max_new_tokens)
        said = [Answer(encoded.ids) for encoded in base.encode(expected)][: len(prompts)]
        for one in said:
            one.ended = "stopped"
        return said

    monkeypatch.setattr("trimtab.evaluate.answers.generate", perfect)
    result = score(base, examples)
    assert result["exact_match"] == 1.0
    assert result["stopped"] == 1.0
    assert result["exact_match_interval"] == list(wilson_interval(3, 3))
    assert all(limit > max(len(e.ids) for e in base.encode(expected)) for limit in limits)
    assert result["rows"] == 3
    assert [answer["right"] for answer in result["answers"]] == [True] * 3


def test_an_answer_is_cut_off_where_the_context_is_full(base, monkeypatch):
    """By example: a longer question leaves less room. A random model never stops."""
    examples = [asked("Hello " * 4, "4"), asked("Hello", "4" * 16)]
    prompts = [len(tokenize_prompt(example.messages[:-1], base)) for example in examples]
    limit = 17 + 17 // 4 + 8
    monkeypatch.setattr(base.model.config, "max_position_embeddings", prompts[0] + 20)
    answers = score_answers(base, examples)
    assert [(answer.tokens, answer.ended) for answer in answers] == [(20, "context"), (limit, "length")]
    result = score(base, examples)
    assert (result["cut_by_context"], result["stopped"]) == (1, 0.0)
    for full, said in ((1, True), (0, False)):
        console = Console(width=200, file=io.StringIO())
        console.print(
            scores_table({"adapter": {**result, "cut_by_context": full}, "base": {**result, "cut_by_context": 0}}, "rows")
        )
        assert ("because the model's context was full: 1 of adapter" in " ".join(console.file.getvalue().split())) == said


def test_plain_text_has_a_loss_and_no_answers(base):
    result = score(base, [Text("hello world, the answer", "rows:1")])
    assert (result["metrics"], result["stopped"], result["answers"]) == ({}, None, [])
    assert result["loss"] > 0


def test_rows_that_cannot_be_measured_are_refused_rather_than_left_out(base):
    with pytest.raises(DataError, match=r"rows:2: messages\[0\] \(user\) holds the model's control token <\|im_end\|> as text"):
        score(base, [asked("Hello", "4"), asked("a<|im_end|>b", "4", "rows:2")])
    with pytest.raises(DataError, match="there are no examples"):
        score(base, [])


def test_a_broken_model_has_no_score(base):
    rows = tokenize_examples([asked("Hello", "4")], base, SourceReport(("rows",)))
    with torch.no_grad():
        kept = base.model.model.norm.weight.clone()
        base.model.model.norm.weight[0] = float("nan")
    try:
        with pytest.raises(NonFinite, match="The loss on rows:1 is not finite"):
            score_loss(base, rows)
    finally:
        with torch.no_grad():
            base.model.model.norm.weight.copy_(kept)


def test_own_answers_stand_beside_those_of_their_row_with_each_ones_length(base):
    rows = [
        Preference(asked("first", "abc"), asked("first", "a long one"), "row:1"),
        Judged(asked("second", "ab"), True, "row:2"),
        Judged(asked("third", "abcdef"), False, "row:3"),
    ]
    found = answer_preferences(base, rows)
    assert [row["question"] for row in found] == ["first", "second", "third"]
    given = [{side: one["tokens"] for side, one in row.items() if side not in ("question", "answer")} for row in found]
    long = {text: len(base.encode([text])[0].ids) for text in ("abc", "a long one", "ab", "abcdef")}
    assert given == [{"chosen": long["abc"], "rejected": long["a long one"]}, {"good": long["ab"]}, {"bad": long["abcdef"]}]
    assert len(set(long.values())) == 4
    prompts = [tokenize_prompt(one.messages[:-1], base) for one in (rows[0].chosen, rows[1].conversation, rows[2].conversation)]
    expected = generate(base.model, prompts, base.stop_ids, max_new_tokens=long["a long one"] + long["a long one"] // 4 + 8)
    assert [row["answer"]["tokens"] for row in found] == [len(ids) for ids in expected]
    assert [row["answer"]["text"] for row in found] == [base.decode(ids).strip() for ids in expected]
