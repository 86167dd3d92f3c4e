"""How good a model is on held-out rows: its loss, and how often its answer is the right one, with intervals.

The intervals are 95 %: a percentile bootstrap over rows for the loss, Wilson's for a share of rows (Wilson 1927).
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
from trimtab.data import Account, Conversation, Judged, Preference, asked, make_sequences, pack_all
from trimtab.data.example import TokenRow
from trimtab.engine import Answer, Ended, generate
from trimtab.methods import room
from trimtab.objectives import Objective, mean_measures, score_packs
from trimtab.objectives.sft import SFT

Interval = tuple[float, float]
Z = 1.959963984540054
"""The 97.5th percentile of the normal distribution."""


@dataclass(frozen=True)
class Loss:
    """The objective's mean: over all learned tokens, in nats, or over all pairs or judged answers."""

    loss: float
    interval: Interval
    tokens: int
    rows: int
    measures: dict[str, float] = field(default_factory=dict)
    """What the objective gives people to read beside the loss: means over the rows."""
    sums: list[float] = field(default_factory=list)
    """The loss of each row (of each pair, say), summed over its items, …"""
    counts: list[int] = field(default_factory=list)
    """… and how many those are."""
    logprobs: list[float] = field(default_factory=list)
    """Σ log p of each row's learned tokens, in the order of the rows; of mismatched ones, nothing."""

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


@dataclass(frozen=True)
class Answered:
    """One held-out question, and what the model said."""

    question: str
    expected: str
    answer: str
    tokens: int
    """Of the answer."""
    ended: Ended
    """By itself, or cut off: at a length at which it is wrong, or where the model's context is full."""

    @property
    def stopped(self) -> bool:
        """It ended by itself."""
        return self.ended == "stopped"

    @property
    def right(self) -> bool:
        """Equal but for reasoning, special tokens, and white space at the ends."""
        return self.answer.strip() == self.expected.strip()


@torch.no_grad()
def score_loss(base: Base, rows: Sequence[TokenRow], pack_tokens: int = 1024, objective: Objective | None = None) -> Loss:
    """The loss of the model as it stands (an attached adapter counts) on `rows`. Raises NonFinite if it is not a number.

    Args:
        objective: Supervised fine-tuning's unless given.
    """
    objective = objective or SFT()
    sums: list[float] = []
    counts: list[int] = []
    measured: list[dict[str, Tensor]] = []
    found: dict[int, float] = {}
    learned, kl = score_packs(base.model, objective, pack_all(rows, pack_tokens))
    for pack, logprobs in learned:
        for row, one in zip(pack.rows, logprobs.tolist(), strict=True):
            if not math.isfinite(one):
                raise NonFinite(f"The loss on {row.where} is not a number: the model's weights, or an adapter's, are broken.")
            found[id(row)] = one
        sums += objective.losses(logprobs, pack, kl).tolist()
        counts += objective.counts(pack)
        measured.append(objective.measures(logprobs, pack, kl))
    tokens = sum(len(row.target_indices) for pack, _ in learned for row in pack.rows)
    in_order = [found[id(row)] for row in rows if id(row) in found]
    loss, interval = sum(sums) / sum(counts), _bootstrap(sums, counts)
    return Loss(loss, interval, tokens, len(sums), mean_measures(measured), sums, counts, in_order)


def score_answers(
    base: Base, examples: Sequence[Conversation], on_done: Callable[[int], None] | None = None, others: Sequence[str] = ()
) -> list[Answered]:
    """The model's own answers (greedy) to the last turn of each conversation.

    An answer is cut a little beyond the length of the longest expected one, or of `others` if that is longer: by then it is wrong.
    """
    pairs = asked(examples, base)
    longest = max(
        (len(one) for one in [*(expected for _, expected in pairs), *(e.ids for e in base.encode(others))]), default=0
    )
    limit = longest + longest // 4 + 8
    answers: list[Answer] = []
    for start in range(0, len(pairs), 32):
        part = pairs[start : start + 32]
        answers += generate(base.model, [ids for ids, _ in part], base.stop_ids, max_new_tokens=limit)
        if on_done:
            on_done(len(part))
    return [
        Answered(_question(example), base.said(expected), base.said(answer), len(answer), answer.ended)
        for example, (_, expected), answer in zip(examples, pairs, answers, strict=True)
    ]


def answer_preferences(
    base: Base, examples: Sequence[Preference | Judged], on_done: Callable[[int], None] | None = None
) -> list[dict[str, Any]]:
    """The model's own answer to each prompt, beside the row's answers, and how many tokens each has; as JSON data."""
    rows: list[dict[str, Conversation]] = [
        {"chosen": e.chosen, "rejected": e.rejected}
        if isinstance(e, Preference)
        else {"good" if e.good else "bad": e.conversation}
        for e in examples
    ]
    texts = [{side: one.messages[-1]["content"] for side, one in row.items()} for row in rows]
    own = score_answers(base, [next(iter(row.values())) for row in rows], on_done, [t for row in texts for t in row.values()])
    lengths = iter([len(encoded.ids) for encoded in base.encode([text for row in texts for text in row.values()])])
    return [
        {
            "question": answered.question,
            **{side: {"text": text, "tokens": next(lengths)} for side, text in row.items()},
            "answer": {"text": answered.answer, "tokens": answered.tokens, "ended": answered.ended},
        }
        for answered, row in zip(own, texts, strict=True)
    ]


def score(base: Base, examples: Sequence[Any], on_done: Callable[[int], None] | None = None) -> dict[str, Any]:
    """Rows, loss, perplexity and exact match with their intervals, as JSON data; and the answers.

    Raises:
        DataError: There are no rows, or some can't be measured; a score on the others would be taken for one on all.
    """
    account = Account(("evaluation",))
    sequences = make_sequences(
        examples, base, account, max_length=(most := room(base.model, base.context_length)), limit=f"the context length {most}"
    )
    if account.refused or not sequences:
        problems = [f"{where}: {reason}" for where, reason in account.refused]
        raise DataError(
            f"data: rows that can't be measured:\n{listing(problems)}" if problems else "data: there are no rows to measure on."
        )
    loss = score_loss(base, sequences)
    conversations = [e for e in examples if isinstance(e, Conversation)]
    answers = score_answers(base, conversations, on_done)
    right = sum(answer.right for answer in answers)
    return {
        "rows": loss.rows,
        "loss": loss.loss,
        "loss_interval": list(loss.interval),
        "perplexity": loss.perplexity,
        "exact_match": right / len(answers) if answers else None,
        "exact_match_interval": list(wilson(right, len(answers))) if answers else None,
        "stopped": sum(answer.stopped for answer in answers) / len(answers) if answers else None,
        "cut_by_context": sum(answer.ended == "context" for answer in answers),
        "answers": [{**vars(answer), "right": answer.right} for answer in answers],
    }


def wilson(hits: int, of: int) -> Interval:
    """Wilson's 95 % interval for the share that `hits` of `of` estimates."""
    share, z2 = hits / of, Z * Z
    middle = share + z2 / (2 * of)
    half = Z * math.sqrt(share * (1 - share) / of + z2 / (4 * of * of))
    return max(0.0, (middle - half) / (1 + z2 / of)), min(1.0, (middle + half) / (1 + z2 / of))


def paired(ours: Sequence[float], theirs: Sequence[float], counts: list[int]) -> tuple[float, Interval]:
    """How much larger our loss is than theirs on the same rows, and the interval of that: by the row, so that what makes rows
    unlike each other does not widen it."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    return sum(differences) / sum(counts), _bootstrap(differences, counts)


def _bootstrap(sums: list[float], counts: list[int], draws: int = 1000) -> Interval:
    generator, rows = np.random.RandomState([0]), len(sums)  # draws what random.Random(0).choices does, fast
    of_sums, of_counts, means = np.array(sums), np.array(counts), np.empty(draws)
    for n in range(draws):
        chosen = (generator.random_sample(rows) * rows).astype(np.int64)
        means[n] = of_sums[chosen].sum() / of_counts[chosen].sum()
    means.sort()
    return float(means[int(0.025 * draws)]), float(means[int(0.975 * draws) - 1])


def _question(example: Conversation) -> str:
    return next((m["content"] for m in reversed(example.messages[:-1]) if m["role"] == "user"), "")
