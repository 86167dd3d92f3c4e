"""Classification: the answer is a label."""

from collections.abc import Sequence

import numpy as np

from trimtab.evaluate.intervals import Measured
from trimtab.evaluate.metrics._base import Metric, ScoredAnswer

MOST = 20
"""Answers that may all be different, and still be labels."""


class Label(Metric):
    """Accuracy, and macro F1: the mean over labels of the F1 of each. The labels are the expected answers that occur."""

    def measure(self, answers: Sequence[ScoredAnswer]) -> Measured:
        said, expected = [a.answer.strip() for a in answers], [a.expected.strip() for a in answers]
        labels = sorted(set(expected))
        if len(labels) == len(answers) > MOST:
            self.refuse([f"each of the {len(answers)} expected answers is another one, so they are no labels"])
        right = [float(one == wanted) for one, wanted in zip(said, expected, strict=True)]
        columns = [np.array(right), np.ones(len(answers))]
        for label in labels:
            given, wanted = (np.array([text == label for text in texts], dtype=np.float64) for texts in (said, expected))
            columns += [given + wanted, given * wanted]

        def values(sums: np.ndarray) -> dict[str, float]:
            occurring, hits = sums[2::2], sums[3::2]
            f1 = 2 * hits[occurring > 0] / occurring[occurring > 0]
            return {"accuracy": float(sums[0] / sums[1]), "macro_f1": float(f1.mean())}

        return Measured(np.column_stack(columns), values, {"accuracy": right}, frozenset({"accuracy"}))
