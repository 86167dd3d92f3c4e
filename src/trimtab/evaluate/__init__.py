"""Scores on held-out rows."""

from trimtab.evaluate.scores import Answered, Loss, answer_preferences, paired, score, score_answers, score_loss, wilson

__all__ = ["Answered", "Loss", "answer_preferences", "paired", "score", "score_answers", "score_loss", "wilson"]
