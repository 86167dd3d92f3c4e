"""chrF (Popović 2015) of the whole corpus, from 0 to 100: an F-score of characters in sequence, for any language."""

from collections.abc import Sequence

from pydantic import Field

from trimtab.evaluate.intervals import Measured
from trimtab.evaluate.metrics._base import Metric, ScoredAnswer
from trimtab.evaluate.metrics._sacrebleu import measure


class Chrf(Metric):
    """chrF of the whole corpus, from 0 to 100, by the package sacrebleu."""

    package = "sacrebleu"
    best = 100.0

    word_order: int = Field(0, ge=0)
    """Sequences of so many words count as well; 2 is chrF++."""

    def measure(self, answers: Sequence[ScoredAnswer]) -> Measured:
        from sacrebleu.metrics import CHRF

        metric = CHRF(word_order=self.word_order)
        return measure(metric, "chrf", answers, metric)
