"""The loss on held-out examples, with its 95 % interval."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.base import Base
from trimtab.core.errors import DataError, NonFinite, listing
from trimtab.data import LengthLimit, SourceReport, Text, pack_all, tokenize_examples
from trimtab.data.example import TokenRow
from trimtab.engine import ensure_exact
from trimtab.evaluate.agreement import agree_on_questions
from trimtab.evaluate.intervals import Interval, Measured, bootstrap
from trimtab.methods import max_row_length
from trimtab.objectives import Objective, mean_measures, score_packs
from trimtab.objectives.sft import SFT


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
    places: list[int] = field(default_factory=list)
    """The place among the rows of each row (or of each pair's first) in `sums`, which are in the order of packs."""

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def in_order(self) -> list[tuple[float, float]]:
        """The sum and the number of items of each row (or pair), in the order of the rows."""
        return [(of_row, count) for _, of_row, count in sorted(zip(self.places, self.sums, self.counts, strict=True))]

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
            low, high = bootstrap(sums, counts) if len(sums) > 1 else (None, None)  # one example says nothing of others
            found[name] = {"loss": sum(sums) / sum(counts), "low": low, "high": high, "rows": len(sums)}
        return {"sources": found} if found else {}

    @property
    def measured(self) -> Measured:
        """As a metric, to be compared with another model's."""
        return Measured(np.array([self.sums, self.counts]).T, lambda sums: {"loss": float(sums[0] / sums[1])})


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
    first: list[TokenRow] = []
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
        first += [row for row in pack.rows if row.side != "rejected"]  # which belongs to the one before it
        measures.append(objective.measures(logprobs, pack, kl))
    tokens = sum(len(row.target_indices) for pack, _ in scored for row in pack.rows)
    in_order = [by_row[id(row)] for row in rows if id(row) in by_row]
    numbers = {id(row): number for number, row in enumerate(rows)}
    places, sources = [numbers[id(row)] for row in first], [row.source for row in first]
    loss, interval = sum(sums) / sum(counts), bootstrap(sums, counts)
    return Loss(loss, interval, tokens, len(sums), mean_measures(measures), sums, counts, in_order, sources, places)


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
    agree_on_questions(base, "the examples", [[row.ids, row.target_indices, row.weights] for row in rows])
    return rows
