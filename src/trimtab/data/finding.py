"""The result of one check of the data."""

from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["good", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    name: str
    status: Status
    message: str
    """The result in words; of a note or a problem, also what to do."""
    facts: dict[str, Any] = field(default_factory=dict)
    """The same as JSON data."""

    def plain(self) -> dict[str, Any]:
        return {"name": self.name, "status": self.status, "words": self.message, "facts": self.facts}
