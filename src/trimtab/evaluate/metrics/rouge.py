"""ROUGE (Lin 2004): the words, pairs of words and longest common subsequence that answer and expected answer share."""

from collections.abc import Sequence

from trimtab.evaluate.intervals import Measured
from trimtab.evaluate.metrics._base import Metric, ScoredAnswer
from trimtab.evaluate.metrics._words import words

KINDS = ("rouge1", "rouge2", "rougeL")


class Rouge(Metric):
    """The mean F-measures ROUGE-1, ROUGE-2 and ROUGE-L, by the package rouge-score, without stemming.

    Its own words are those of a-z and digits alone, so other languages would get 0; here words of all scripts count.
    """

    package = "rouge_score"

    def measure(self, answers: Sequence[ScoredAnswer]) -> Measured:
        from rouge_score.rouge_scorer import RougeScorer
        from rouge_score.tokenizers import Tokenizer

        class Words(Tokenizer):
            def tokenize(self, text: str) -> list[str]:
                return words(text)

        scorer = RougeScorer(list(KINDS), tokenizer=Words())
        scores = [scorer.score(answer.expected, answer.answer) for answer in answers]
        return Measured.means({kind: [score[kind].fmeasure for score in scores] for kind in KINDS})
