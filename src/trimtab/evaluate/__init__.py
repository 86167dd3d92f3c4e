"""Scores on held-out rows."""

from trimtab.evaluate.scoring import Answered, Loss, score, score_answers, score_loss, wilson

__all__ = ["Answered", "Loss", "score", "score_answers", "score_loss", "wilson"]
