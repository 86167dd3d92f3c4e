"""Training examples, their token rows, and the report of what became of every example of a data source."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

from trimtab.core.chat import Message

Column = Literal[
    "messages", "conversations", "instruction", "input", "output", "system", "history", "tools", "prompt", "completion", "text",
    "chosen", "rejected", "label", "kto_tag", "chat_template_kwargs",
]  # fmt: skip
COLUMNS = frozenset(get_args(Column))
"""Every column that some format reads."""

Role = Literal["system", "user", "assistant", "tool"]
TrainOn = Literal["assistant", "last", "everything"] | tuple[Role, ...]
"""What is trained on of a conversation."""

RawRow = tuple[str, dict[str, Any]]
"""A row of a data file: its place, and its columns. Places are unique within a source: file:line, file:line:column where a
JSON array has several rows on a line, or file:number where there are no lines."""


@dataclass(frozen=True)
class Conversation:
    """A conversation, of which some messages are trained on; see `data.trained`."""

    messages: tuple[Message, ...]
    where: str
    """file:line."""
    tools: tuple[Any, ...] = ()
    """JSON schemas of the tools that the assistant may call."""
    weights: Mapping[int, float] = field(default_factory=dict)
    """Weights in the loss that messages have of their own, by index; 0 is in the context, and not trained on."""
    train_on: TrainOn = "assistant"
    """Which of the other messages are trained on, with weight 1."""
    prompt: int = 0
    """How many messages came as a prompt, apart from their completion."""
    is_completion: bool = False
    """It came as prompt and completion: for a base without a chat template, the second continues the first."""
    source: str = ""
    """The name of its source in the recipe; empty where sources have no names."""
    switches: Mapping[str, Any] = field(default_factory=dict)
    """Switches of the chat template that this example sets, such as `enable_thinking`; the model's hold for the others."""


@dataclass(frozen=True)
class Text:
    """Plain text, all of which is trained on."""

    text: str
    where: str
    source: str = ""


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt, of which the first is the better one. Of each, only the last message is trained on."""

    chosen: Conversation
    rejected: Conversation
    where: str
    as_judged: bool = False
    """It is trained on as a good and a bad answer, each by itself."""
    source: str = ""


@dataclass(frozen=True)
class Judged:
    """A conversation whose last message is labeled good or bad."""

    conversation: Conversation
    good: bool
    where: str
    source: str = ""


Example = Conversation | Text | Preference | Judged

Kind = Literal["answers", "pairs", "judged"]
"""What an objective trains on: conversations and texts, compared answers, or answers that are judged one by one."""


Overlong = Literal["refuse", "truncate", "drop", "split"]
"""What becomes of an example that is longer than examples may be. Only plain texts can be split."""


def parts_of(example: Example) -> tuple[Conversation | Text, ...]:
    """The conversations or the text of an example, which are tokenized one by one."""
    if isinstance(example, Preference):
        return example.chosen, example.rejected
    return (example.conversation,) if isinstance(example, Judged) else (example,)


class InvalidExample(Exception):
    """Why an example can't be used; becomes a RejectedExample with its place."""


class TooLong(InvalidExample):
    """It is longer than examples may be, and such are dropped on request."""


class RejectedExample(NamedTuple):
    """An example that can't be used, and why."""

    where: str
    """file:line."""
    reason: str


Side = Literal["chosen", "rejected", "good", "bad", "mismatched"]
"""`mismatched` is another example's answer after this example's prompt, which is not trained on: KTO estimates a KL divergence on it."""
GROUPED = {("chosen", "rejected"), ("good", "mismatched"), ("bad", "mismatched")}
"""Sides of neighbouring token rows that belong to one example."""


@dataclass(frozen=True)
class TokenRow:
    """One example, or one of the answers in it, as tokens."""

    ids: list[int]
    """Every token of the row up to its last target."""
    target_indices: list[int]
    """Indices into `ids` of the target tokens, increasing, none of them 0: each is predicted from those before it."""
    where: str
    """file:line."""
    full_length: int = 0
    """How many tokens the row had before those behind its last target were dropped."""
    side: Side | None = None
    """What its answer is, where answers are compared or judged."""
    reference: float = 0.0
    """Σ log p of the target tokens in the reference model, in nats, for objectives that have one."""
    source: str = ""
    """The name of its source in the recipe; empty where sources have no names."""
    weights: list[float] | None = None
    """The weight of each target token in the loss; None if all are 1."""

    @property
    def total_weight(self) -> float:
        """Σ weights: the number of target tokens, if all are 1."""
        return len(self.target_indices) if self.weights is None else math.fsum(self.weights)


def row_groups(rows: Iterable[TokenRow]) -> list[list[int]]:
    """The indices of rows that are trained on in one step: those of an example whose answers are compared, or one row by itself."""
    groups: list[list[int]] = []
    before: Side | None = None
    for number, row in enumerate(rows):
        if (before, row.side) in GROUPED:
            groups[-1].append(number)
        else:
            groups.append([number])
        before = row.side
    return groups


@dataclass
class SourceReport:
    """What became of every example of a data source: each is used, or rejected, dropped or removed."""

    sources: tuple[str, ...]
    label: str = ""
    """Its name in the recipe, if it has one."""
    used: int = 0
    rejected: list[RejectedExample] = field(default_factory=list)
    unlisted: int = 0
    """Rejected examples beyond those: of a corpus, the first ones are listed."""
    dropped: list[str] = field(default_factory=list)
    """Places of examples that were longer than allowed, and were dropped for it."""
    duplicates: list[str] = field(default_factory=list)
    """Places of examples that were removed because an earlier one is the same."""
    held_out_too: list[str] = field(default_factory=list)
    """Places of training examples that were removed because they are validation examples as well."""
    split: int = 0
    """Texts that were longer than allowed, and were split …"""
    blocks: int = 0
    """… into so many blocks."""
    ignored_columns: set[str] = field(default_factory=set)
    """Columns that the data has and no format reads."""
    removed_nulls: int = 0
    """Nulls that were left out: Arrow puts one wherever an object lacks a key that another one has."""

    @property
    def name(self) -> str:
        paths = ", ".join(self.sources)
        return f"{self.label} ({paths})" if self.label else paths

    @property
    def total(self) -> int:
        return (
            self.used + len(self.rejected) + self.unlisted + len(self.dropped) + len(self.duplicates) + len(self.held_out_too)
        )

    def __str__(self) -> str:
        counts = {
            "too long and dropped": len(self.dropped),
            "removed as duplicates": len(self.duplicates),
            "removed because they are validation examples": len(self.held_out_too),
        }
        more = "".join(f", {count:,} {words}" for words, count in counts.items() if count)
        cut = f"; {self.split:,} long texts split into {self.blocks:,} blocks" if self.split else ""
        return f"{self.name}: {self.total:,} examples: {self.used:,} used, {len(self.rejected) + self.unlisted:,} rejected{more}{cut}"

    def plain(self) -> dict[str, Any]:
        """The report as JSON data."""
        return {
            "name": self.label,
            "source": ", ".join(self.sources),
            "rows": self.total,
            "used": self.used,
            "refused": [example._asdict() for example in self.rejected],
            **({"refused_unlisted": self.unlisted} if self.unlisted else {}),
            "dropped": self.dropped,
            "duplicates": self.duplicates,
            "held_out_too": self.held_out_too,
            "split": self.split,
            "blocks": self.blocks,
            "columns_not_read": sorted(self.ignored_columns),
            "nulls_left_out": self.removed_nulls,
        }
