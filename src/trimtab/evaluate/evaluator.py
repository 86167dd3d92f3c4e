"""An evaluation: the loss and metrics of models on the same held-out examples, and how far they differ."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trimtab.base import Base
from trimtab.core.processes import processes
from trimtab.data import Conversation
from trimtab.data.example import TokenRow
from trimtab.evaluate.answers import answer_questions, questions
from trimtab.evaluate.config import EvalConfig
from trimtab.evaluate.function import FunctionFailed, UserFunction
from trimtab.evaluate.intervals import Measured, differences
from trimtab.evaluate.metrics import ScoredAnswer
from trimtab.evaluate.scores import Loss, evaluation_rows, score_loss

OWN_NAMES = ("rows", "loss", "perplexity", "sources", "metrics", "stopped", "cut_by_context", "answers", "function_error")
"""Names in the result of an evaluation that values can't have."""


@dataclass(frozen=True)
class Answers:
    """A model's answers, and what they are measured by."""

    answers: list[ScoredAnswer]
    measured: dict[str, Measured]
    """By metric."""
    best: dict[str, float | None]
    """By the name of a value, the best there is; None of a function of the user's."""
    function_error: str | None = None
    """Why the user's function could not measure them."""

    @property
    def values(self) -> dict[str, float]:
        return {name: value for measured in self.measured.values() for name, value in measured.total.items()}

    def plain(self) -> dict[str, Any]:
        """Values with their intervals, and the answers, as JSON data."""
        result: dict[str, Any] = {"metrics": self.best}
        for measured in self.measured.values():
            intervals = measured.intervals()
            for name, value in measured.total.items():
                result |= {name: value, f"{name}_interval": list(intervals[name])}
        if self.function_error is not None:
            result["function_error"] = self.function_error
        count = len(self.answers)
        result["stopped"] = sum(answer.ended == "stopped" for answer in self.answers) / count if count else None
        result["cut_by_context"] = sum(answer.ended == "context" for answer in self.answers)
        each = {name: values for measured in self.measured.values() for name, values in measured.each.items()}
        result["answers"] = [
            {**answer.plain(), "metrics": {name: values[number] for name, values in each.items()}}
            for number, answer in enumerate(self.answers)
        ]
        return result


@dataclass(frozen=True)
class Scores:
    """What an evaluation found."""

    loss: Loss
    answers: Answers

    def plain(self) -> dict[str, Any]:
        """As JSON data."""
        return {
            "rows": self.loss.rows,
            "loss": self.loss.loss,
            "loss_interval": list(self.loss.interval),
            "perplexity": self.loss.perplexity,
            **self.loss.by_source,
            **self.answers.plain(),
        }

    def minus(self, other: "Scores") -> dict[str, dict[str, Any]]:
        """How far they are from those of another model on the same examples, by name, as JSON data."""
        theirs = {"": other.loss.measured, **other.answers.measured}
        found = {}
        for metric, ours in {"": self.loss.measured, **self.answers.measured}.items():
            for name, difference in differences(ours, theirs[metric]).items() if metric in theirs else ():
                found[name] = {**difference._asdict(), "distinguishable": difference.distinguishable}
        return found


class Exam:
    """Held-out questions, and what the answers to them are measured by; models can take it one after another.

    Raises:
        RecipeError, DataError: A metric can't be used, or not on these examples.
    """

    def __init__(
        self,
        base: Base,
        conversations: Sequence[Conversation],
        config: EvalConfig | None = None,
        function: UserFunction | None = None,
    ) -> None:
        self.base, self.config, self.function = base, config or EvalConfig(), function
        self.asked = questions(base, conversations) if self.config.asks_for_answers else []
        perfect = [question.perfect for question in self.asked]
        notes = [metric.check(perfect) for metric in self.config.metrics] if perfect else []
        self.notes = [note for note in notes if note is not None]
        """What the user should know about the metrics on these examples."""

    def take(self, on_done: Callable[[int], None] | None = None) -> Answers:
        """The answers of the model with its active adapters.

        Args:
            on_done: Called with the number of answers in each finished batch.
        """
        answers = answer_questions(self.base, self.asked, self.config, on_done)
        if not answers:
            return Answers([], {}, {})
        measured = {metric.name: metric.measure(answers) for metric in self.config.metrics}
        best: dict[str, float | None] = {
            name: metric.best for metric in self.config.metrics for name in measured[metric.name].total
        }
        found = Answers(answers, measured, best)
        if self.function is None:
            return found
        if processes.first:  # it may be a program with a world of its own
            found = _measured_by(self.function, found)
        processes.wait()  # here, where the others may wait for longer than within a step
        return found


def _measured_by(function: UserFunction, found: Answers) -> Answers:
    try:
        own = function.measure(found.answers, taken=(*found.best, *OWN_NAMES))
    except FunctionFailed as failed:
        return replace(found, function_error=str(failed))
    return replace(found, measured={**found.measured, "function": own}, best={**found.best, **dict.fromkeys(own.each)})


def evaluate(base: Base, rows: Sequence[TokenRow], exam: Exam, on_done: Callable[[int], None] | None = None) -> Scores:
    """What the model with its active adapters makes of rows, and of the exam on the same examples."""
    return Scores(score_loss(base, rows), exam.take(on_done))


def score(base: Base, examples: Sequence[Any], on_done: Callable[[int], None] | None = None, **settings: Any) -> dict[str, Any]:
    """Loss, perplexity and metrics with their intervals, and the answers, as JSON data.

    Args:
        on_done: Called with the number of answers in each finished batch.
        settings: As in a recipe's `eval`, such as `metrics` and `temperature`.

    Raises:
        DataError: There are no examples, or some can't be evaluated.
        RecipeError: There are no such settings, or a metric can't be used.
    """
    config, rows = EvalConfig(**settings), evaluation_rows(base, examples)
    function = UserFunction(config.function) if config.function is not None else None
    conversations = [example for example in examples if isinstance(example, Conversation)]
    return evaluate(base, rows, Exam(base, conversations, config, function), on_done).plain()
