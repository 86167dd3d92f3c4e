"""Evaluation of models on held-out examples."""

from trimtab.evaluate.scores import (
    Loss,
    ScoredAnswer,
    answer_preferences,
    paired_difference,
    score,
    score_answers,
    score_loss,
    wilson_interval,
)  # fmt: skip

__all__ = [
    "Loss", "ScoredAnswer", "answer_preferences", "paired_difference", "score", "score_answers", "score_loss", "wilson_interval",
]  # fmt: skip
