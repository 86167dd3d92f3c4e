"""What every tracker is: settings in a recipe, and a session that receives the lines of a run's metrics.jsonl."""

import importlib.util
import netrc
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from trimtab.core.config import Choice
from trimtab.core.errors import RecipeError
from trimtab.track._names import Line

Text = Annotated[str, Field(min_length=1)]
Mode = Literal["auto", "online", "offline"]


@dataclass(frozen=True)
class Opening:
    """What a session begins with."""

    folder: Path
    """Where the tracker may keep files: RUN/trackers/NAME."""
    id: str
    """The run's, made once: a run that is resumed or sent again has the same."""
    name: str
    """The run's, for people."""
    config: dict[str, Any]
    """The recipe, and what was decided before the first step."""


class Session(ABC):
    """One run in a tracker, open. Every method may raise, or take as long as it likes: it has a process of its own."""

    def has(self, line: Line) -> bool:
        """Whether the tracker holds this line already, of an earlier part of the run, and would hold it twice."""
        return False

    @abstractmethod
    def log(self, line: Line) -> None: ...

    def flush(self) -> None:  # noqa: B027 (most have nothing to do)
        """Called when no further line is there yet."""

    @abstractmethod
    def close(self, done: bool) -> None:
        """
        Args:
            done: Whether training has ended well, rather than having been interrupted, or failed.
        """


class Tracker(Choice):
    """A service or file format that shows the curves of runs."""

    family: ClassVar[str] = "trimtab.track"
    default: ClassVar[str] = "tensorboard"
    package: ClassVar[str]
    """What is imported of it."""

    project: Text = "trimtab"
    """What runs are grouped under."""
    run: Text | None = None
    """The run's name there; that of its output folder unless given."""

    def check_available(self) -> None:
        """Raise RecipeError if its package is not installed."""
        if importlib.util.find_spec(self.package) is None:
            raise RecipeError(
                f"track: {self.name} needs the package {self.package}, which is not installed: pip install 'trimtab[{self.name}]'."
            )

    @abstractmethod
    def place(self, folder: Path) -> str:
        """Where the run's numbers go, in words, with how to look at them there or to upload them."""

    def environment(self, folder: Path) -> dict[str, str | None]:
        """Variables to set, or unset, before its package is imported."""
        return {}

    @abstractmethod
    def open(self, opening: Opening) -> Session: ...


def without_password(text: str) -> str:
    """The text with the passwords of addresses in it left out."""
    return re.sub(r"(://[^\s/:@]*):[^\s/@]+@", r"\1:…@", text)


def in_netrc(path: Path, *hosts: str) -> bool:
    """Whether a .netrc file holds a login for one of these hosts, or for any, if none is given."""
    try:
        known = netrc.netrc(path).hosts
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
        return False
    return any(host in known for host in hosts) if hosts else bool(known)
