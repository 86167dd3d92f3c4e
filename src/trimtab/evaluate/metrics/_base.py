"""What a metric is: a comparison of answers with the expected ones."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar, NoReturn

from trimtab.core.config import Choice
from trimtab.core.errors import DataError, RecipeError, listing
from trimtab.data import Conversation
from trimtab.engine import Ended
from trimtab.evaluate.intervals import Measured


@dataclass(frozen=True)
class ScoredAnswer:
    """A held-out question with the expected answer and the model's."""

    question: str
    expected: str
    answer: str
    tokens: int
    """The length of the answer."""
    ended: Ended
    """`stopped` at a stop token or string, or cut off: at a `length`, or because the model's `context` was full."""
    example: Conversation
    raw: str
    """The answer with special tokens and reasoning, …"""
    expected_raw: str
    """… and the expected one as the template writes it."""

    @property
    def correct(self) -> bool:
        """Whether the answer equals the expected one; both are without reasoning and special tokens, and stripped."""
        return self.answer.strip() == self.expected.strip()

    @property
    def where(self) -> str:
        return self.example.where

    def plain(self) -> dict[str, Any]:
        """As JSON data."""
        names = ("where", "question", "expected", "answer", "tokens", "ended")
        return {**{name: getattr(self, name) for name in names}, "right": self.correct}


class Metric(Choice):
    """A comparison of answers with the expected ones. One concrete subclass per file in this folder; the file's name is its name."""

    family: ClassVar[str] = "trimtab.evaluate.metrics"
    default: ClassVar[str] = "exact_match"

    package: ClassVar[str | None] = None
    """The module that computes it, of the extra `metrics`."""
    best: ClassVar[float] = 1.0
    """Its value where the answer is the expected one. Values of 1 at best are shown in percent."""

    @abstractmethod
    def measure(self, answers: Sequence[ScoredAnswer]) -> Measured:
        """What it counts in each answer. Raises DataError for expected answers that it can't be used on."""

    def check(self, perfect: Sequence[ScoredAnswer]) -> str | None:
        """Check, before anything is generated, that it can measure these examples.

        Args:
            perfect: The expected answers as they would be if the model gave them.

        Returns:
            What the user should know of examples to which even the expected answer does not do justice.

        Raises:
            RecipeError: Its package is missing, or it finds no expected answer equal to itself.
            DataError: It can't be used on some of them.
        """
        if self.package is not None and find_spec(self.package) is None:
            raise RecipeError(
                f"eval.metrics: {self.name} needs the package {self.package}, which is not installed: pip install 'trimtab[metrics]'."
            )
        name, values = next(iter(self.measure(perfect).each.items()))
        wrong = [answer.where for answer, value in zip(perfect, values, strict=True) if value < self.best - 1e-6]
        if not wrong:
            return None
        message = f"eval.metrics: {name} of the expected answer itself is below {self.best:g} in {len(wrong)} of {len(perfect)} examples"
        if len(wrong) == len(perfect):
            raise RecipeError(f"{message} ({wrong[0]}, …), so it does not measure this data. Choose another metric.")
        return f"{message} ({wrong[0]}{', …' if len(wrong) > 1 else ''}): no answer to these can do better"

    def refuse(self, problems: list[str]) -> NoReturn:
        """Raise DataError for examples that it can't be used on."""
        raise DataError(f"eval.metrics: {self.name} can't measure these examples:\n{listing(problems)}")
