"""A regular expression that finds what counts in answer and expected answer, such as the number after GSM8K's ####."""

import re
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator

from trimtab.evaluate.intervals import Measured
from trimtab.evaluate.metrics._base import Metric, ScoredAnswer


def _compiled(pattern: str) -> str:
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"is not a regular expression: {error}.") from None
    if groups > 1:
        raise ValueError(f"has {groups} groups; one at most says what counts. Write (?:…) for the others.")
    return pattern


class Regex(Metric):
    """The share of answers in which the pattern finds what it finds in the expected one; and of those in which it finds anything."""

    pattern: Annotated[str, AfterValidator(_compiled)]
    """A regular expression of Python's; its group is what counts, or the whole match if it has none."""
    match: Literal["first", "last"] = "first"
    """Which match counts, if there are several."""

    def measure(self, answers: Sequence[ScoredAnswer]) -> Measured:
        said, expected = [self._find(a.answer) for a in answers], [self._find(a.expected) for a in answers]
        if missing := [a.where for a, wanted in zip(answers, expected, strict=True) if wanted is None]:
            self.refuse([f"{where}: the expected answer has no match for {self.pattern}" for where in missing])
        right = [float(one is not None and _equal(one, str(wanted))) for one, wanted in zip(said, expected, strict=True)]
        found = [float(one is not None) for one in said]
        return Measured.means({"regex": right, "regex_found": found}, shares=["regex", "regex_found"])

    def _find(self, text: str) -> str | None:
        found = [match[match.re.groups] or "" for match in re.finditer(self.pattern, text)]
        return (found[0] if self.match == "first" else found[-1]).strip() if found else None


def _equal(one: str, other: str) -> bool:
    """Whether they are the same text or the same number: 1,000 is 1000.0."""
    try:
        return one == other or float(one.replace(",", "")) == float(other.replace(",", ""))
    except ValueError:
        return False
