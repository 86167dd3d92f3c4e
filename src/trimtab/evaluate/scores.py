"""Evaluation on held-out examples: the loss and the share of correct answers, with 95 % intervals.

The interval of a loss is a percentile bootstrap over examples; that of a share is Wilson's (Wilson 1927).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.base import Base
from trimtab.core.errors import DataError, NonFinite, listing
from trimtab.data import (
    Conversation,
    Judged,
    LengthLimit,
    Preference,
    SourceReport,
    Text,
    pack_all,
    tokenize_answers,
    tokenize_examples,
)
from trimtab.data.example import TokenRow
from trimtab.engine import Answer, Ended, ensure_exact, generate
from trimtab.methods import max_row_length
from trimtab.objectives import Objective, mean_measures, score_packs
from trimtab.objectives.sft import SFT

Interval = tuple[float, float]
Z = 1.959963984540054
"""The 97.5th percentile of the normal distribution."""


@dataclass(frozen=True)
class Loss:
    """The objective's mean loss: over all target tokens by their weights, in nats, or over all pairs or judged answers."""

    loss: float
    interval: Interval
    tokens: int
    rows: int
    measures: dict[str, float] = field(default_factory=dict)
    """The objective's metrics besides the loss: means over the rows."""
    sums: list[float] = field(default_factory=list)
    """The loss of each row (or pair), summed over its items, …"""
    counts: list[float] = field(default_factory=list)
    """… and the number of those."""
    logprobs: list[float] = field(default_factory=list)
    """Σ log p of each row's target tokens, in the order of the rows, without mismatched ones."""
    sources: list[str] = field(default_factory=list)
    """The name of the source of each row (or pair) in `sums`; empty where sources have no names."""

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def by_source(self) -> dict[str, Any]:
        """Of each named source the mean loss, its interval and the number of rows, as JSON data under `sources`; empty if none has a name."""
        parts: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in sorted({*self.sources} - {""})}
        for name, of_row, count in zip(self.sources, self.sums, self.counts, strict=False):
            if name:
                parts[name][0].append(of_row)
                parts[name][1].append(count)
        found = {}
        for name, (sums, counts) in parts.items():
            low, high = _bootstrap(sums, counts) if len(sums) > 1 else (None, None)  # one example says nothing of others
            found[name] = {"loss": sum(sums) / sum(counts), "low": low, "high": high, "rows": len(sums)}
        return {"sources": found} if found else {}


@dataclass(frozen=True)
class ScoredAnswer:
    """A held-out question with the expected answer and the model's."""

    question: str
    expected: str
    answer: str
    tokens: int
    """The length of the answer."""
    ended: Ended
    """`stopped` at a stop token, or cut off: at a `length` at which it is wrong, or because the model's `context` was full."""

    @property
    def correct(self) -> bool:
        """Whether the answer equals the expected one; both are without reasoning and special tokens, and stripped."""
        return self.answer.strip() == self.expected.strip()


@torch.no_grad()
def score_loss(base: Base, rows: Sequence[TokenRow], pack_tokens: int = 1024, objective: Objective | None = None) -> Loss:
    """The loss on `rows` of the model with its active adapters.

    Raises UnsupportedModel or DataError for what packs don't compute exactly, NonFinite if a log-probability is NaN or Inf.

    Args:
        objective: Supervised fine-tuning by default.
    """
    ensure_exact(base.model, rows)
    objective = objective or SFT()
    sums: list[float] = []
    counts: list[float] = []
    sources: list[str] = []
    measures: list[dict[str, Tensor]] = []
    by_row: dict[int, float] = {}
    scored, kl = score_packs(base.model, objective, pack_all(rows, pack_tokens))
    for pack, logprobs in scored:
        for row, logprob in zip(pack.rows, logprobs.tolist(), strict=True):
            if not math.isfinite(logprob):
                raise NonFinite(f"The loss on {row.where} is not finite: the weights of the model or of an adapter are broken.")
            by_row[id(row)] = logprob
        sums += objective.losses(logprobs, pack, kl).tolist()
        counts += objective.counts(pack)
        sources += [row.source for row in pack.rows if row.side != "rejected"]  # which belongs to the one before it
        measures.append(objective.measures(logprobs, pack, kl))
    tokens = sum(len(row.target_indices) for pack, _ in scored for row in pack.rows)
    in_order = [by_row[id(row)] for row in rows if id(row) in by_row]
    loss, interval = sum(sums) / sum(counts), _bootstrap(sums, counts)
    return Loss(loss, interval, tokens, len(sums), mean_measures(measures), sums, counts, in_order, sources)


def score_answers(
    base: Base, examples: Sequence[Conversation], on_done: Callable[[int], None] | None = None, texts: Sequence[str] = ()
) -> list[ScoredAnswer]:
    """The model's answers to the last turn of each conversation, by greedy decoding.

    An answer is cut off somewhat beyond the length of the longest expected answer or of `texts`: by then it is wrong.

    Args:
        on_done: Called with the number of answers in each finished batch.
    """
    pairs = tokenize_answers(examples, base)
    longest = max(
        map(len, [*(expected for _, expected in pairs), *(encoding.ids for encoding in base.encode(texts))]), default=0
    )
    limit = longest + longest // 4 + 8
    answers: list[Answer] = []
    for start in range(0, len(pairs), 32):
        batch = pairs[start : start + 32]
        answers += generate(base.model, [ids for ids, _ in batch], base.stop_ids, max_new_tokens=limit)
        if on_done:
            on_done(len(batch))
    return [
        ScoredAnswer(_question(example), base.answer_text(expected), base.answer_text(answer), len(answer), answer.ended)
        for example, (_, expected), answer in zip(examples, pairs, answers, strict=True)
    ]


def answer_preferences(
    base: Base, examples: Sequence[Preference | Judged], on_done: Callable[[int], None] | None = None
) -> list[dict[str, Any]]:
    """The model's answer to each prompt, the example's answers, and their numbers of tokens, as JSON data."""
    sides: list[dict[str, Conversation]] = [
        {"chosen": e.chosen, "rejected": e.rejected}
        if isinstance(e, Preference)
        else {"good" if e.good else "bad": e.conversation}
        for e in examples
    ]
    texts = [{side: conversation.messages[-1]["content"] for side, conversation in example.items()} for example in sides]
    all_texts = [text for example in texts for text in example.values()]
    answers = score_answers(base, [next(iter(example.values())) for example in sides], on_done, all_texts)
    lengths = iter([len(encoding.ids) for encoding in base.encode(all_texts)])
    return [
        {
            "question": answer.question,
            **{side: {"text": text, "tokens": next(lengths)} for side, text in example.items()},
            "answer": {"text": answer.answer, "tokens": answer.tokens, "ended": answer.ended},
        }
        for answer, example in zip(answers, texts, strict=True)
    ]


def evaluation_rows(base: Base, examples: Sequence[Any], block: int | None = None) -> list[TokenRow]:
    """Examples as token rows, to be evaluated.

    Args:
        block: The most tokens of a plain text, which is split; as many as the model's context has, unless given.

    Raises:
        DataError: There are none, or some are rejected: a score of the others would be taken for one of all.
    """
    most, report = max_row_length(base.model, base.context_length), SourceReport(("evaluation",))
    texts = [example for example in examples if isinstance(example, Text)]
    others = [example for example in examples if not isinstance(example, Text)]
    rows = tokenize_examples(others, base, report, LengthLimit(most, name=f"the context length {most}"))
    blocks = [length for length in (block, most) if length is not None]
    rows += tokenize_examples(texts, base, report, LengthLimit(min(blocks, default=None), "split"))
    if report.rejected or not rows:
        problems = [f"{where}: {reason}" for where, reason in report.rejected]
        raise DataError(
            f"data: examples that can't be evaluated:\n{listing(problems)}" if problems else "data: there are no examples."
        )
    return rows


def score(
    base: Base, examples: Sequence[Any], on_done: Callable[[int], None] | None = None, block: int | None = None
) -> dict[str, Any]:
    """Loss, perplexity and exact match with their intervals, and the answers, as JSON data.

    Args:
        block: The most tokens of a block of a plain text.

    Raises:
        DataError: There are no examples, or some can't be evaluated.
    """
    loss = score_loss(base, evaluation_rows(base, examples, block))
    answers = score_answers(base, [e for e in examples if isinstance(e, Conversation)], on_done)
    correct = sum(answer.correct for answer in answers)
    return {
        "rows": loss.rows,
        "loss": loss.loss,
        "loss_interval": list(loss.interval),
        "perplexity": loss.perplexity,
        **loss.by_source,
        "exact_match": correct / len(answers) if answers else None,
        "exact_match_interval": list(wilson_interval(correct, len(answers))) if answers else None,
        "stopped": sum(answer.ended == "stopped" for answer in answers) / len(answers) if answers else None,
        "cut_by_context": sum(answer.ended == "context" for answer in answers),
        "answers": [{**vars(answer), "right": answer.correct} for answer in answers],
    }


def wilson_interval(hits: int, of: int) -> Interval:
    """Wilson's 95 % interval of the share `hits` / `of`."""
    share, z2 = hits / of, Z * Z
    middle = share + z2 / (2 * of)
    half = Z * math.sqrt(share * (1 - share) / of + z2 / (4 * of * of))
    return max(0.0, (middle - half) / (1 + z2 / of)), min(1.0, (middle + half) / (1 + z2 / of))


def paired_difference(ours: Sequence[float], theirs: Sequence[float], counts: list[float]) -> tuple[float, Interval]:
    """The mean difference of two losses on the same rows, and its interval, which differences between rows do not widen.

    Args:
        counts: The number of items whose losses each row sums.
    """
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    return sum(differences) / sum(counts), _bootstrap(differences, counts)


def _bootstrap(sums: list[float], counts: list[float], draws: int = 1000) -> Interval:
    generator, rows = np.random.RandomState([0]), len(sums)  # draws as random.Random(0).choices, but faster
    of_sums, of_counts, means = np.array(sums), np.array(counts), np.empty(draws)
    for n in range(draws):
        chosen = (generator.random_sample(rows) * rows).astype(np.int64)
        means[n] = of_sums[chosen].sum() / of_counts[chosen].sum()
    means.sort()
    return float(means[int(0.025 * draws)]), float(means[int(0.975 * draws) - 1])


def _question(example: Conversation) -> str:
    return next((m["content"] for m in reversed(example.messages[:-1]) if m["role"] == "user"), "")
