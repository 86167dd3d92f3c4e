"""Evaluation of models on held-out examples."""

from trimtab.evaluate.answers import answer_preferences, score_answers
from trimtab.evaluate.config import EvalConfig
from trimtab.evaluate.evaluator import Exam, evaluate, score
from trimtab.evaluate.function import UserFunction
from trimtab.evaluate.intervals import paired_difference, wilson_interval
from trimtab.evaluate.metrics import ScoredAnswer
from trimtab.evaluate.scores import Loss, evaluation_rows, score_loss

__all__ = [
    "EvalConfig", "Exam", "Loss", "ScoredAnswer", "UserFunction", "answer_preferences", "evaluate", "evaluation_rows",
    "paired_difference", "score", "score_answers", "score_loss", "wilson_interval",
]  # fmt: skip
