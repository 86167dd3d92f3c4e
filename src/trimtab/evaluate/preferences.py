"""Evaluation by a preference objective: its loss and measures on pairs or judged answers, and the divergence from the reference."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from trimtab.base import Base
from trimtab.core.errors import ArtifactError
from trimtab.data import Example
from trimtab.data.mismatched import with_mismatched
from trimtab.evaluate.reference import PACK_TOKENS, add_reference_logprobs, divergence
from trimtab.evaluate.scores import evaluation_rows, score_loss
from trimtab.methods import Attached, max_row_length
from trimtab.objectives import Objective


class Reference(NamedTuple):
    """A run's reference model."""

    source: str
    """`base`, an adapter or run folder, or a model."""
    identity: str | None
    """Its hash in training; None if unknown."""


def score_preferences(
    base: Base,
    adapter: Attached,
    examples: Sequence[Example],
    objective: Objective,
    reference: Reference | None,
    seed: int,
    *,
    with_base: bool = False,
) -> dict[str, dict[str, Any]]:
    """An objective's loss and measures of the adapter, and of the base model too if `with_base`, by name.

    They include the exact divergence from the reference (from the base model, for an objective that has none), in nats per token.

    Args:
        seed: Determines which answers KTO's estimate pairs with which prompts.

    Raises:
        DataError: Some of the examples can't be evaluated.
        ArtifactError: The reference has changed.
    """
    answers = evaluation_rows(base, examples)
    rows = (
        with_mismatched(answers, seed, max_row_length(base.model, base.context_length)) if objective.estimates_kl else answers
    )
    source = reference.source if reference is not None else "base"
    if reference is not None:
        referenced = add_reference_logprobs(base, adapter, source, rows, PACK_TOKENS)
        if reference.identity not in (None, referenced.facts["identity"]):
            raise ArtifactError(f"{source}: has changed since it was the run's reference, so the rewards would differ.")
        rows = referenced.rows

    def evaluate() -> dict[str, Any]:
        loss = score_loss(base, rows, PACK_TOKENS, objective)
        return {
            "objective": objective.name,
            "rows": loss.rows,
            "loss": loss.loss,
            "loss_interval": list(loss.interval),
            **loss.by_source,
            **loss.measures,
            "divergence": divergence(base, adapter, source, answers, PACK_TOKENS),
        }

    scores = {}
    if with_base:
        with adapter.disabled():
            scores["base"] = evaluate()
    scores["adapter"] = evaluate()
    return scores
