"""F1 of words, as SQuAD has it (Rajpurkar et al. 2016): how many words answer and expected answer share."""

import re
import string
from collections import Counter
from collections.abc import Sequence

from trimtab.evaluate.intervals import Measured
from trimtab.evaluate.metrics._base import Metric, ScoredAnswer
from trimtab.evaluate.metrics._words import spaced

_PUNCTUATION = str.maketrans("", "", string.punctuation)


class F1(Metric):
    """The mean F1 of the words that answer and expected answer share; without case, punctuation and English articles."""

    def measure(self, answers: Sequence[ScoredAnswer]) -> Measured:
        return Measured.means({"f1": [f1(answer.answer, answer.expected) for answer in answers]})


def f1(answer: str, expected: str) -> float:
    """The harmonic mean of precision and recall of an answer's words."""
    said, wanted = _words(answer), _words(expected)
    if not said or not wanted:
        return float(said == wanted)
    shared = sum((Counter(said) & Counter(wanted)).values())
    return 2 * shared / (len(said) + len(wanted))


def _words(text: str) -> list[str]:
    """As SQuAD's script divides it; but in scripts without blanks between words, each character is one."""
    return spaced(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION))).split()
