"""BLEU (Papineni et al. 2002) of the whole corpus, from 0 to 100, by the package sacrebleu."""

from collections.abc import Sequence
from typing import Literal

from trimtab.evaluate.intervals import Measured
from trimtab.evaluate.metrics._base import Metric, ScoredAnswer
from trimtab.evaluate.metrics._sacrebleu import measure
from trimtab.evaluate.metrics._words import is_chinese, is_unspaced


class Bleu(Metric):
    """BLEU of the whole corpus, from 0 to 100, by the package sacrebleu."""

    package = "sacrebleu"
    best = 100.0

    tokenizer: Literal["auto", "13a", "intl", "zh", "char", "none"] = "auto"
    """The tokenizer of sacrebleu; `auto` is zh for Chinese, char for other languages that write words together, 13a for all others."""

    def measure(self, answers: Sequence[ScoredAnswer]) -> Measured:
        from sacrebleu.metrics import BLEU

        tokenizer = self.tokenizer
        if tokenizer == "auto":
            expected = [answer.expected for answer in answers]
            tokenizer = "zh" if is_chinese(expected) else "char" if is_unspaced(expected) else "13a"
        return measure(BLEU(tokenize=tokenizer), "bleu", answers, BLEU(tokenize=tokenizer, effective_order=True))
