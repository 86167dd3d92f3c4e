"""Answers that are JSON: whether they are valid, and how many of the expected fields they have right."""

from collections.abc import Iterator, Sequence
from typing import Any

from trimtab.data.strict_json import parse_json
from trimtab.evaluate.intervals import Measured
from trimtab.evaluate.metrics._base import Metric, ScoredAnswer


class Json(Metric):
    """The share of answers that are JSON and nothing else, and the mean share of the expected fields that are equal, at any depth.

    Fields that were not expected are not counted: exact_match or a function sees those.
    """

    def measure(self, answers: Sequence[ScoredAnswer]) -> Measured:
        valid, fields, problems = [], [], []
        for answer in answers:
            try:
                expected = dict(_leaves(parse_json(answer.expected)))
            except ValueError as error:
                problems.append(f"{answer.where}: the expected answer is not valid JSON: {error}")
                continue
            try:
                said = dict(_leaves(parse_json(answer.answer)))
            except ValueError:
                said = {}
            valid.append(float(bool(said)))
            fields.append(sum(path in said and _equal(said[path], value) for path, value in expected.items()) / len(expected))
        if problems:
            self.refuse(problems)
        return Measured.means({"json_valid": valid, "json_fields": fields}, shares=["json_valid"])


def _leaves(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Each field that holds no others (an empty object or list is one), by its path."""
    inner: Sequence[tuple[str | int, Any]] = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    if not inner:
        yield path, value
    for key, part in inner:
        yield from _leaves(part, (*path, key))


def _equal(one: Any, other: Any) -> bool:
    """Whether two values are equal: 1 and 1.0 are, 1 and true are not."""
    return isinstance(one, bool) == isinstance(other, bool) and one == other
