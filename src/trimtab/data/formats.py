"""The shapes that rows of answers come in, told apart by their columns; there is no registry to fill in.

| shape | columns |
|---|---|
| OpenAI | `messages`: [{`role`, `content`, `tool_calls`, `weight`}], `system`, `tools` |
| ShareGPT | `conversations`: [{`from`, `value`, `weight`}], `system`, `tools` |
| Alpaca / BELLE | `instruction`, `input`, `output`, `system`, `tools`, `history`: [[question, answer]] |
| prompt and completion | `prompt`, `completion`: both texts or both lists of messages; `system`, `tools` |
| text | `text` |
"""

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, NamedTuple

from trimtab.data.example import COLUMNS, Account, Conversation, Example, Judged, Preference, RawRow, Refusal, Refused, Text
from trimtab.data.messages import read_messages, read_tools, text_of


class Shape(NamedTuple):
    required: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[dict[str, Any], str], Example]

    @property
    def columns(self) -> set[str]:
        return {*self.required, *self.optional}


COMPARED = {"chosen", "rejected"}
FOR_ANOTHER = "compares two answers, which this objective does not learn from: dpo does, for one"
JUDGED = {"label", "kto_tag"}
MEDIA = {"image", "images", "audio", "audios", "video", "videos"}

ASKED = ("question", "query", "problem", "input", "source", "user", "human", "instruction", "prompt")
ANSWERED = ("answer", "response", "solution", "output", "target", "assistant", "bot", "gpt", "reply", "completion")
"""What people call a prompt and its completion, the likeliest first."""


def read_examples(
    rows: Iterable[RawRow | Refusal],
    columns: Mapping[Any, str],
    account: Account,
    shapes: Sequence[Shape] | None = None,
    ignore: Iterable[str] = (),
) -> Iterator[Example]:
    """Rows as examples, one by one; what can't be used goes to the account, with its reason.

    Args:
        shapes: What they can be read as; answers unless given.
        columns: What Trimtab calls a column -> what the data calls it.
        ignore: Columns, and keys of messages, that are left out.
    """
    shapes, ignored = shapes or ANSWERS, set(ignore)
    for row in rows:
        if isinstance(row, Refusal):
            account.refused.append(row)
            continue
        where, values = row
        try:
            shape, renamed = _shape_of(_without(values, ignored) if ignored else values, columns, shapes)
            example = shape.read(renamed, where)
            _refuse_lost(renamed, shape, example, MEDIA if columns else MEDIA | COLUMNS)
        except Refused as refused:
            pair = COMPARED.issubset(values) and not any(COMPARED.issubset(shape.required) for shape in shapes)
            account.refused.append(Refusal(where, FOR_ANOTHER if pair else str(refused)))
            continue
        read = {columns.get(column, column) for column in shape.columns}
        account.unread.update(name for name in values.keys() - read - ignored if _our_name(name, values) not in read)
        yield example


def _without(values: dict[str, Any], ignored: set[str]) -> dict[str, Any]:
    """A row without these columns, and without these keys of its messages."""

    def kept(value: Any) -> Any:
        if isinstance(value, list):
            return [kept(one) for one in value]
        return {key: inner for key, inner in value.items() if key not in ignored} if isinstance(value, dict) else value

    return {name: kept(value) for name, value in values.items() if name not in ignored}


def _refuse_lost(row: dict[str, Any], shape: Shape, example: Example, known: Set[str]) -> None:
    """Refuse a row with one of these columns, which rows of other formats have, unless what it says stands in the example all the same."""
    for name in sorted(row.keys() & known - shape.columns):
        value = row[name]
        if value in (None, "", [], {}) or (isinstance(value, str) and value.strip() in _said_in(example)):
            continue
        why = f"which rows of {'/'.join(shape.required)} are read without"
        why = (
            "and Trimtab trains on texts alone"
            if name in MEDIA
            else "which kto learns from, and this objective not"
            if name in JUDGED
            else why
        )
        raise Refused(f"has {name}, {why}: leave the column out with data.ignore=[{name}], or the row")


def _said_in(example: Example) -> set[str]:
    if isinstance(example, Text):
        return {example.text.strip()}
    one = (
        example.chosen if isinstance(example, Preference) else example.conversation if isinstance(example, Judged) else example
    )
    return {message["content"].strip() for message in one.messages}


def _shape_of(row: dict[str, Any], columns: Mapping[Any, str], shapes: Sequence[Shape]) -> tuple[Shape, dict[str, Any]]:
    """The only shape that fits, and the row with our names. What data.columns names goes before what is called so."""
    for ours, theirs in columns.items():
        if theirs not in row:
            raise Refused(f"has no column {theirs!r}, which data.columns says is the {ours}; it has {_names(row)}")
    renamed = {_our_name(name, row): value for name, value in row.items() if name not in columns.values()}
    renamed |= {ours: row[theirs] for ours, theirs in columns.items()}
    allowed = [shape for shape in shapes if columns.keys() <= shape.columns]
    there = {column for column, value in renamed.items() if value is not None}
    fitting = [shape for shape in allowed if there.issuperset(shape.required)]
    fitting = [one for one in fitting if not any(set(one.required) < set(other.required) for other in fitting)]
    if len(fitting) == 1:
        return fitting[0], renamed
    if fitting:
        both = " and ".join("/".join(shape.required) for shape in fitting)
        one = fitting[0].required[0]
        raise Refused(f"could be read as {both}: keep the columns of one, or say which (data.columns.{one}={one})")
    if not allowed:
        raise Refused(f"data.columns names {', '.join(columns)}, which no shape has together")
    raise Refused(_missing(renamed, allowed))


def _our_name(name: str, row: dict[str, Any]) -> str:
    """`Prompt` or ` prompt` as `prompt`, if no other column is called so."""
    if name in COLUMNS or not isinstance(name, str):
        return name
    ours = name.strip().lower()
    alike = [other for other in row if isinstance(other, str) and other.strip().lower() == ours]
    return ours if ours in COLUMNS and len(alike) == 1 else name


def _missing(row: dict[str, Any], shapes: list[Shape]) -> str:
    partly = [shape for shape in shapes if any(column in row for column in shape.required)]
    named = {str(name).lower(): name for name in row}
    if partly:
        closest = max(partly, key=lambda shape: sum(row.get(column) is not None for column in shape.required))
        absent = next(column for column in closest.required if row.get(column) is None)
        present = [column for column in closest.required if row.get(column) is not None]
        beside = f" beside {', '.join(present)}" if present else ""
        if absent in row:
            return f"column {absent!r} is null{beside}; the row has {_names(row)}"
        others = {low: name for low, name in named.items() if name not in closest.columns}
        meant = next((_first(words, others) for words in (ASKED, ANSWERED) if absent in words), None)
        near = meant or next((others[low] for low in difflib.get_close_matches(absent, others, n=1)), None)
        pair = _as_pair(named, shapes)
        hint = f" (is it {near!r}? Then say data.columns.{absent}={near})" if near else f" (say{pair})" if pair else ""
        return f"column {absent!r} is missing{beside}{hint}; the row has {_names(row)}"
    known = "; ".join(", ".join(shape.required) for shape in shapes)
    two = dict(zip(("question", "answer"), named.values(), strict=True)) if len(named) == 2 else {}
    example = _as_pair(named, shapes) or _as_pair(two, shapes) or " data.columns.prompt=question"
    return f"has {_names(row)}, which fits no shape ({known}). Name them with data.columns, e.g.{example}"


def _as_pair(named: Mapping[str, str], shapes: Sequence[Shape]) -> str:
    """How to say that two columns are a prompt and its completion, if two look like it."""
    asked, answered = _first(ASKED, named), _first(ANSWERED, named)
    if asked is None or answered is None or ("prompt", "completion") not in [shape.required for shape in shapes]:
        return ""
    return f" data.columns.prompt={asked} data.columns.completion={answered}"


def _first(words: Iterable[str], named: Mapping[str, str]) -> str | None:
    """The name of the first of these words that is there."""
    return next((named[word] for word in words if word in named), None)


def _names(row: dict[str, Any]) -> str:
    return ", ".join(name or "a column without a name" for name in row) or "no columns"


def _conversation(
    messages: list[dict[str, Any]], where: str, tools: Any = None, silent: Iterable[int] = (), continues: bool = False
) -> Conversation:
    silent = frozenset(silent)
    spoken = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    if not spoken:
        raise Refused("no message is the assistant's, so there is nothing to learn")
    if silent.issuperset(spoken):
        raise Refused("every assistant message has weight 0, so there is nothing to learn")
    return Conversation(tuple(messages), where, read_tools(tools), silent, continues)


def _in_turns(column: str) -> Callable[[dict[str, Any], str], Example]:
    """How to read a row whose messages stand in this column."""

    def read(row: dict[str, Any], where: str) -> Example:
        messages, silent = read_messages(row[column], column)
        system = _system(row)
        if system and messages[0]["role"] == "system":
            raise Refused(
                f"has a column system and a system message in {column}: leave one out, for example with data.ignore=[system]"
            )
        return _conversation(system + messages, where, row.get("tools"), (number + len(system) for number in silent))

    return read


def _alpaca(row: dict[str, Any], where: str) -> Example:
    messages = _system(row)
    history = row.get("history") or []
    for number, pair in enumerate(history if isinstance(history, list) else [history]):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise Refused(f"history[{number}] is not a pair of question and answer")
        messages.append({"role": "user", "content": text_of(pair[0], f"history[{number}][0]")})
        messages.append({"role": "assistant", "content": text_of(pair[1], f"history[{number}][1]")})
    question = text_of(row["instruction"], "instruction")
    beside = row.get("input")
    if beside is not None and text_of(beside, "input", empty=True).strip():
        question = f"{question}\n{beside}"
    messages.append({"role": "user", "content": question})
    messages.append({"role": "assistant", "content": text_of(row["output"], "output")})
    return _conversation(messages, where, row.get("tools"))


def _system(row: dict[str, Any]) -> list[dict[str, Any]]:
    system = row.get("system")
    return [{"role": "system", "content": text_of(system, "system")}] if system not in (None, "") else []


def _prompt_completion(row: dict[str, Any], where: str) -> Example:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) or isinstance(completion, list):
        asked, _ = read_messages(prompt, "prompt")
        answered, silent = read_messages(completion, "completion")
        if all(message["role"] != "assistant" for message in answered):
            raise Refused("no message of the completion is the assistant's, so there is nothing to learn")
        # What stands in the prompt is given, not learned, whoever said it.
        system = _system(row)
        if system and asked[0]["role"] == "system":
            raise Refused(
                "has a column system and a system message in prompt: leave one out, for example with data.ignore=[system]"
            )
        asked = system + asked
        given = [n for n, message in enumerate(asked) if message["role"] == "assistant"]
        return _conversation(asked + answered, where, row.get("tools"), [*given, *(n + len(asked) for n in silent)])
    messages = [
        *_system(row),
        {"role": "user", "content": text_of(prompt, "prompt")},
        {"role": "assistant", "content": text_of(completion, "completion")},
    ]
    return _conversation(messages, where, row.get("tools"), continues=len(messages) == 2)


def _plain(row: dict[str, Any], where: str) -> Example:
    return Text(text_of(row["text"], "text"), where)


ANSWERS = (
    Shape(("messages",), ("system", "tools"), _in_turns("messages")),
    Shape(("conversations",), ("system", "tools"), _in_turns("conversations")),
    Shape(("instruction", "output"), ("input", "system", "history", "tools"), _alpaca),
    Shape(("prompt", "completion"), ("system", "tools"), _prompt_completion),
    Shape(("text",), (), _plain),
)
