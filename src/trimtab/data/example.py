"""What one can learn from, and the account of the rows that it came from."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Conversation:
    """Messages in turns; the assistant's are learned, except those with `learn` false."""

    messages: tuple[dict[str, Any], ...]
    """Each with `role` (system, user, assistant, tool) and `content`, as chat templates read them."""
    where: str
    """file:line."""
    tools: tuple[Any, ...] = ()
    """JSON schemas of the tools that the assistant may call."""
    silent: frozenset[int] = frozenset()
    """Indices of assistant messages that are read but not learned."""
    continues: bool = False
    """Came as prompt and completion: for a base without a chat template, the second continues the first."""


@dataclass(frozen=True)
class Text:
    """Plain text, all of which is learned."""

    text: str
    where: str


Example = Conversation | Text


class Refusal(NamedTuple):
    """A row that can't be used, and why."""

    where: str
    """file:line."""
    reason: str


@dataclass(frozen=True)
class Sequence:
    """One row as tokens."""

    ids: list[int]
    """Every token of the row up to the last one that is learned."""
    learned: list[int]
    """Indices into `ids` of the tokens to learn, increasing, none of them 0: each is predicted from those before it."""
    where: str
    """file:line."""
    shown: int = 0
    """How many tokens the row had before what follows the last learned one was dropped."""


@dataclass
class Account:
    """Where every row of a data source went: rows in = used + refused, always."""

    sources: tuple[str, ...]
    used: int = 0
    refused: list[Refusal] = field(default_factory=list)
    unread: set[str] = field(default_factory=set)
    """Columns that the rows have and nothing reads."""

    @property
    def name(self) -> str:
        return ", ".join(self.sources)

    @property
    def rows(self) -> int:
        return self.used + len(self.refused)

    def __str__(self) -> str:
        return f"{self.name}: {self.rows:,} rows in = {self.used:,} used + {len(self.refused):,} refused"

    def plain(self) -> dict[str, Any]:
        """The account as JSON data."""
        return {
            "source": self.name,
            "rows": self.rows,
            "used": self.used,
            "refused": [refusal._asdict() for refusal in self.refused],
            "columns_not_read": sorted(self.unread),
        }
