"""What one can learn from, and the account of the rows that it came from."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

Column = Literal[
    "messages", "conversations", "instruction", "input", "output", "system", "history", "tools", "prompt", "completion", "text",
    "chosen", "rejected", "label", "kto_tag",
]  # fmt: skip
COLUMNS = frozenset(get_args(Column))
"""Every column that some format reads."""

RawRow = tuple[str, dict[str, Any]]
"""Where it stands, and its columns. No two rows of a source stand at the same place: it is file:line, or file:line:column
where a JSON array has several rows on a line, or file:number where there are no lines."""


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


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt, of which the first is the better one. Of each, the last message alone is learned."""

    chosen: Conversation
    rejected: Conversation
    where: str
    apart: bool = False
    """Learned as a good and a bad answer, each by itself."""


@dataclass(frozen=True)
class Judged:
    """A conversation whose last message has been found good or bad."""

    conversation: Conversation
    good: bool
    where: str


Example = Conversation | Text | Preference | Judged

Kind = Literal["answers", "pairs", "judged"]
"""What an objective learns from: conversations and texts, answers compared, or answers judged each by itself."""


class Refused(Exception):
    """Why a row can't be used; becomes a Refusal with the row's place."""


class Refusal(NamedTuple):
    """A row that can't be used, and why."""

    where: str
    """file:line."""
    reason: str


Side = Literal["chosen", "rejected", "good", "bad", "mismatched"]
"""`mismatched` is another row's answer after this row's prompt, which nobody learns: KTO estimates a divergence on it."""
TOGETHER = {("chosen", "rejected"), ("good", "mismatched"), ("bad", "mismatched")}
"""Sides of neighbours that belong to one row."""


@dataclass(frozen=True)
class TokenRow:
    """One row as tokens."""

    ids: list[int]
    """Every token of the row up to the last one that is learned."""
    target_indices: list[int]
    """Indices into `ids` of the tokens to learn, increasing, none of them 0: each is predicted from those before it."""
    where: str
    """file:line."""
    shown: int = 0
    """How many tokens the row had before what follows the last learned one was dropped."""
    side: Side | None = None
    """What its learned answer is, where answers are compared or judged."""
    reference: float = 0.0
    """Σ log p of the learned tokens in the reference model, in nats, for objectives that have one."""


def units(sequences: Iterable[TokenRow]) -> list[list[int]]:
    """The numbers of sequences that are learned in one step: those of a row whose answers are compared, or one by itself."""
    found: list[list[int]] = []
    before: Side | None = None
    for number, sequence in enumerate(sequences):
        if (before, sequence.side) in TOGETHER:
            found[-1].append(number)
        else:
            found.append([number])
        before = sequence.side
    return found


@dataclass
class Account:
    """Where every row of a data source went: rows in = used + refused, always."""

    sources: tuple[str, ...]
    used: int = 0
    refused: list[Refusal] = field(default_factory=list)
    unread: set[str] = field(default_factory=set)
    """Columns that the rows have and nothing reads."""
    nulls: int = 0
    """Nulls that were left out: Arrow puts one wherever an object lacks a key that another one has."""

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
            "nulls_left_out": self.nulls,
        }
