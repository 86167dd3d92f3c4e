"""The recipe's section `eval`."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SerializeAsAny, model_validator

from trimtab.core.config import as_tuple
from trimtab.core.files import expand_user
from trimtab.engine import Generation
from trimtab.evaluate.metrics import Metric
from trimtab.evaluate.metrics.exact_match import ExactMatch

OneMetric = Annotated[SerializeAsAny[Metric], BeforeValidator(Metric.pick)]


def _listed(raw: Any) -> Any:
    return (raw,) if isinstance(raw, dict | Metric) else as_tuple(raw)


def _each_once(metrics: tuple[Metric, ...]) -> tuple[Metric, ...]:
    names = [metric.name for metric in metrics]
    if repeated := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ValueError(f"{repeated[0]} is given {names.count(repeated[0])} times; give it once.")
    return metrics


def _file_and_name(function: str | None) -> str | None:
    if function is None:
        return None
    file, colon, name = function.rpartition(":")
    if not colon or not file.endswith(".py") or not name.isidentifier():
        raise ValueError(
            f"expected a Python file and the name of a function in it, such as scores.py:length, got {function!r}."
        )
    return function


class EvalConfig(Generation):
    """How answers to held-out examples are generated, and what they are measured by."""

    metrics: Annotated[tuple[OneMetric, ...], BeforeValidator(_listed), AfterValidator(_each_once)] = (ExactMatch(),)
    """Names of metrics, or mappings of a name and keys, such as [rouge, {name: regex, pattern: '#### (.*)'}]; with none, no answers are
    generated."""
    function: Annotated[str | None, AfterValidator(_file_and_name)] = None
    """A metric of your own: file.py:name, a function of an answer and the expected answer (and, if it takes three, a mapping with the
    example), which returns a number or a mapping of names to numbers. The file is run as a program of yours; which one is said first."""
    max_new_tokens: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """The most tokens of an answer; `auto` is somewhat more than the longest expected answer has."""

    samples: Annotated[int, Field(ge=0)] = 0
    """At each evaluation of a run, generate answers to so many validation examples, the first ones; `metrics` and `function` measure them.
    They are shown, and kept in the run's metrics.jsonl."""

    @model_validator(mode="after")
    def _check_is_answered(self) -> "EvalConfig":
        if self.samples and not self.asks_for_answers:
            raise ValueError("samples: with metrics: [] and no function, no answers are generated.")
        return self

    @property
    def asks_for_answers(self) -> bool:
        return bool(self.metrics) or self.function is not None

    def absolute(self) -> "EvalConfig":
        """The same with the function's file as an absolute path."""
        if self.function is None:
            return self
        file, _, name = self.function.rpartition(":")
        return self.model_copy(update={"function": f"{Path(expand_user(file)).absolute()}:{name}"})
