"""Exact match: the share of answers that equal the expected one, but for white space around it."""

from collections.abc import Sequence

from trimtab.evaluate.intervals import Measured
from trimtab.evaluate.metrics._base import Metric, ScoredAnswer


class ExactMatch(Metric):
    """The share of answers that equal the expected one."""

    def measure(self, answers: Sequence[ScoredAnswer]) -> Measured:
        return Measured.means({"exact_match": [float(answer.correct) for answer in answers]}, shares=["exact_match"])
