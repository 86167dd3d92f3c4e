"""What BLEU and chrF share: the package's own statistics of each example, from whose sums it computes the value of a corpus."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from trimtab.evaluate.intervals import Measured
from trimtab.evaluate.metrics._base import ScoredAnswer


def measure(metric: Any, name: str, answers: Sequence[ScoredAnswer], of_one: Any) -> Measured:
    """A corpus's value of a sacrebleu metric.

    Args:
        of_one: The metric for one answer by itself.
    """
    said, expected = [answer.answer for answer in answers], [answer.expected for answer in answers]
    counts = np.array(metric._extract_corpus_statistics(said, [expected]), dtype=np.float64)
    each = [of_one.sentence_score(one, [wanted]).score for one, wanted in zip(said, expected, strict=True)]
    return Measured(counts, lambda sums: {name: float(metric._compute_score_from_stats(sums.tolist()).score)}, {name: each})
