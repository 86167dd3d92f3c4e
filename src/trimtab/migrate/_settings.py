"""The settings of another tool's file, and what becomes of each: a key of the recipe, derived, not there, unknown, or not set."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple, NoReturn

from trimtab.core.errors import RecipeError
from trimtab.core.synonyms import meaning_of

Outcome = Literal["key", "derived", "missing", "unknown", "unset"]
NOTHING: tuple[Any, ...] = (None, "", [], {})
OFF: tuple[Any, ...] = (False, "none", "no", "false", 0)
"""Values by which a setting that is not there is switched off, so that nothing is lost."""


class Setting(NamedTuple):
    """What became of a setting."""

    name: str
    value: Any
    outcome: Outcome
    said: str
    """What was changed or is to be known; why, if it is not there."""
    key: str = ""
    here: Any = None
    """The key's value in the recipe."""


class Settings:
    """The settings of a file, taken one after the other; `settle` says of each what became of it."""

    def __init__(self, tool: str, where: str, given: Mapping[str, Any], defaults: Mapping[str, Any], kind: str = "") -> None:
        """
        Args:
            kind: Which of the tool's classes has them, where it has several.
        """
        self.tool, self.where, self.given, self.defaults, self.kind = tool, where, dict(given), defaults, kind
        self.recipe: dict[str, Any] = {}
        """Dotted key -> value."""
        self.comments: dict[str, str] = {}
        """Dotted key -> what its line in the recipe says beside it."""
        self.settled: list[Setting] = []

    def first(self, *names: str) -> str | None:
        """The first of several names for one thing that has a value; else the first that the tool has a default for."""
        return next((name for values in (self.given, self.defaults) for name in names if values.get(name) not in NOTHING), None)

    def get(self, *names: str) -> Any:
        """The value of the first of these names that has one, or the tool's default; None without either."""
        name = self.first(*names)
        return None if name is None else self.given[name] if self.given.get(name) not in NOTHING else self.defaults.get(name)

    def on(self, *names: str) -> bool:
        """Whether a switch is on."""
        value = self.get(*names)
        return value not in NOTHING and value not in OFF

    def put(self, name: str, value: Any, said: str = "", *, like: str | None = None) -> None:
        """Write a value for a setting at its key, where the table of other tools' names has one.

        Args:
            said: What was changed in meaning.
            like: The setting whose key it is, if its own says it in another way.
        """
        meaning = meaning_of(like or name)
        if meaning is None or meaning.outcome != "key":
            self.settle(name, "missing" if meaning is None else meaning.outcome, said or (meaning.said if meaning else ""))
            return
        self.write(name, meaning.said.partition(" ")[0].partition("=")[0], value, said)

    def write(self, name: str, key: str, value: Any, said: str = "") -> None:
        """Write a value at a key of the recipe that only the tool's own rules know."""
        comment = said or ("" if name in self.given else f"{self.tool}'s default")
        self.recipe[key] = value
        if comment:
            self.comments[key] = comment
        self.settle(name, "key", comment, key, value)

    def settle(self, name: str, outcome: Outcome, said: str = "", key: str = "", here: Any = None) -> None:
        """Say what became of a setting. A default that needs no key needs no word either."""
        if name in self.given or outcome == "key":
            meaning = meaning_of(name)
            said = said or (meaning.said if meaning and outcome in ("derived", "missing") else "")
            self.settled.append(Setting(name, self.given.get(name), outcome, said, key, here))

    def derive(self, *names: str, said: str = "") -> None:
        for name in names:
            self.settle(name, "derived", said)

    def refuse(self, name: str, why: str) -> NoReturn:
        """Raise RecipeError: nothing that a recipe can say would be the same task."""
        raise RecipeError(f"{self.where}: {name}: {self.get(name)}: {why}.")

    def settle_rest(self, options: Iterable[str]) -> None:
        """What the tool's own rules have left, by the table of other tools' names."""
        done = {setting.name for setting in self.settled}
        for name, value in self.given.items():
            if name not in done:
                self._settle_by_table(name, value, list(options))

    def _settle_by_table(self, name: str, value: Any, options: list[str]) -> None:
        meaning = meaning_of(name)
        is_default = name in self.defaults and value == self.defaults[name]
        if value in NOTHING or (is_default and (meaning is None or meaning.outcome != "key")):
            self.settle(name, "unset")
        elif meaning is None:
            near = difflib.get_close_matches(name, options, n=1)
            self.settle(name, "unknown", f"did you mean {near[0]}?" if near else f"no option of {self.tool} that Trimtab knows")
        elif meaning.outcome != "key":
            self.settle(name, "unset" if meaning.outcome == "missing" and value in OFF else meaning.outcome)
        else:
            key, equals, only = meaning.said.partition("=")
            if equals and value in OFF:
                self.settle(name, "unset")
            elif " " in key or "NAME" in key:
                self.settle(name, "missing", f"it is {meaning.said} here")
            else:
                self.put(name, only if equals and value is True else value)
