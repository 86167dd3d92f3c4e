"""How good a model is by a preference objective: its loss and measures on pairs or judged answers, and how far it has moved."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from trimtab.base import Base
from trimtab.core.errors import ArtifactError
from trimtab.data import Example
from trimtab.data.mismatched import with_mismatched
from trimtab.evaluate.reference import PACK_TOKENS, divergence, refer
from trimtab.evaluate.scores import score_loss, tokenize_all
from trimtab.methods import Attached, max_row_length
from trimtab.objectives import Objective


class Reference(NamedTuple):
    """The model that a run was compared with."""

    source: str
    """`base`, an adapter or run folder, or a model."""
    identity: str | None
    """A hash of it, as it was then; None where it is not known."""


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
    """What an objective makes of pairs or judged answers: its loss and measures for the adapter, and for the base too.

    With them the exact divergence from the reference (from the base, for an objective that has none), in nats a token.

    Args:
        seed: Decides which answers are mismatched with which prompts.

    Raises:
        DataError: Some of the rows can't be measured.
        ArtifactError: The reference is not what it was.
    """
    answers = rows = tokenize_all(base, examples)
    if objective.estimates_kl:
        rows = with_mismatched(rows, seed, max_row_length(base.model, base.context_length))
    source = reference.source if reference is not None else "base"
    if reference is not None:
        referred = refer(base, adapter, source, rows, PACK_TOKENS)
        if reference.identity not in (None, referred.facts["identity"]):
            raise ArtifactError(
                f"{source}: is not what it was when the run was compared with it, so its rewards would be others."
            )
        rows = referred.rows

    def measured() -> dict[str, Any]:
        scored = score_loss(base, rows, PACK_TOKENS, objective)
        return {
            "objective": objective.name,
            "rows": scored.rows,
            "loss": scored.loss,
            "loss_interval": list(scored.interval),
            **scored.measures,
            "divergence": divergence(base, adapter, source, answers, PACK_TOKENS),
        }

    scores = {}
    if with_base:
        with adapter.disabled():
            scores["base"] = measured()
    scores["adapter"] = measured()
    return scores
