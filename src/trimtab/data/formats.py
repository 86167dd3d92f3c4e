"""The formats of examples with answers to train on, told apart by their columns; there is no registry.

| format | columns |
|---|---|
| OpenAI | `messages`: [{`role`, `content`, `tool_calls`, `weight`}], `system`, `tools` |
| ShareGPT | `conversations`: [{`from`, `value`, `weight`}], `system`, `tools` |
| Alpaca / BELLE | `instruction`, `input`, `output`, `system`, `tools`, `history`: [[question, answer]] |
| prompt and completion | `prompt`, `completion`: both texts or both lists of messages; `system`, `tools` |
| Gemini | `contents`: [{`role`, `parts`}], `systemInstruction`, `tools` |
| text | `text` |

Messages of any format may be as other interfaces and libraries export them (`data.exported_messages`); `functions` is OpenAI's old name
of `tools`.

Conversations of any format may have `chat_template_kwargs`, switches of the chat template for this one example.
"""

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, NamedTuple

from trimtab.core.chat import Message
from trimtab.data.column_templates import columns_of, fill
from trimtab.data.example import (
    COLUMNS,
    Conversation,
    Example,
    InvalidExample,
    RawRow,
    RejectedExample,
    SourceReport,
    Text,
    TrainOn,
    parts_of,
)
from trimtab.data.exported_messages import are_messages_with_parts, system_parts
from trimtab.data.messages import MEDIA, TEXT_ALONE, read_messages, read_switches, text_of
from trimtab.data.system_message import AS_IT_IS, SystemMessage, with_system
from trimtab.data.tool_calls import read_tools, with_results_linked
from trimtab.data.trained import with_train_on


class Format(NamedTuple):
    required: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[dict[str, Any], str], Example]
    """The example of a row at a place. Raises InvalidExample."""

    @property
    def columns(self) -> set[str]:
        return {*self.required, *self.optional}


PAIR = {"chosen", "rejected"}
PAIR_ELSEWHERE = "compares two answers, which this objective does not train on: dpo does, for one"
LABELS = {"label", "kto_tag"}
THINKING = "enable_thinking"
GEMINI = ("systemInstruction", "system_instruction")
"""What Gemini calls its system message."""
OF_ANY = ("system", *GEMINI, "tools", "functions", "chat_template_kwargs")
"""Columns that conversations of every format may have."""

PROMPTS = ("question", "query", "problem", "input", "source", "user", "human", "instruction", "prompt")
COMPLETIONS = ("answer", "response", "solution", "output", "target", "assistant", "bot", "gpt", "reply", "completion")
"""What people call a prompt and its completion, the likeliest first."""


def read_examples(
    rows: Iterable[RawRow | RejectedExample],
    columns: Mapping[Any, str],
    report: SourceReport,
    formats: Sequence[Format] | None = None,
    ignore: Iterable[str] = (),
    templates: Mapping[str, str] | None = None,
    system: SystemMessage = AS_IT_IS,
    train_on: TrainOn = "assistant",
) -> Iterator[Example]:
    """Rows as examples, one by one; the report lists those that can't be used, with their reasons.

    Args:
        columns: Trimtab's name of a column -> the data's name of it.
        formats: What a row can be read as; `ANSWERS` unless given.
        ignore: Columns, and keys of messages, that are left out.
        templates: Name of a column -> the template that writes it from others.
        system: What becomes of system messages.
        train_on: What is trained on of conversations.
    """
    formats, ignored, templates = formats or ANSWERS, set(ignore), templates or {}
    filled = {column for template in templates.values() for column in columns_of(template)}
    for row in rows:
        if isinstance(row, RejectedExample):
            report.rejected.append(row)
            continue
        where, values = row
        try:
            kept = _without(values, ignored) if ignored else values
            kept = fill(templates, kept, set(columns.values())) if templates else kept
            format, renamed = _match(kept, columns, [one for one in formats if templates.keys() <= one.columns])
            example = format.read(renamed, where)
            _refuse_lost(renamed, format, example, MEDIA if columns else MEDIA | COLUMNS)
            example = with_train_on(with_system(example, system), train_on)
        except InvalidExample as invalid:
            pair_elsewhere = PAIR.issubset(values) and not any(PAIR.issubset(format.required) for format in formats)
            report.rejected.append(RejectedExample(where, PAIR_ELSEWHERE if pair_elsewhere else str(invalid)))
            continue
        read = {columns.get(column, column) for column in format.columns} | filled
        report.ignored_columns.update(name for name in values.keys() - read - ignored if our_name(name, values) not in read)
        yield example


def _without(row: dict[str, Any], ignored: set[str]) -> dict[str, Any]:
    """A row without these columns, and without these keys of its messages."""

    def kept(value: Any) -> Any:
        if isinstance(value, list):
            return [kept(item) for item in value]
        return {key: inner for key, inner in value.items() if key not in ignored} if isinstance(value, dict) else value

    return {name: kept(value) for name, value in row.items() if name not in ignored}


def _refuse_lost(row: dict[str, Any], format: Format, example: Example, known: Set[str]) -> None:
    """Raise InvalidExample for a known column of another format, unless what it says is in the example all the same."""
    if row.get(THINKING) is not None:
        raise InvalidExample(
            f'has {THINKING}, a switch of chat templates, which a column of that name does not set: write {{"{THINKING}": …}} into a column '
            f"chat_template_kwargs, or ignore it with data.ignore=[{THINKING}]"
        )
    for name in sorted(row.keys() & known - format.columns):
        value = row[name]
        if value in (None, "", [], {}) or (isinstance(value, str) and value.strip() in _texts(example)):
            continue
        why = f"which examples with {'/'.join(format.required)} don't use"
        why = "which kto trains on, and this objective does not" if name in LABELS else why
        why = TEXT_ALONE if name in MEDIA else why
        raise InvalidExample(f"has {name}, {why}: ignore the column with data.ignore=[{name}], or leave the example out")


def _texts(example: Example) -> set[str]:
    first = parts_of(example)[0]
    return {first.text.strip()} if isinstance(first, Text) else {message["content"].strip() for message in first.messages}


def _match(row: dict[str, Any], columns: Mapping[Any, str], formats: Sequence[Format]) -> tuple[Format, dict[str, Any]]:
    """The only format that matches, and the row with our names. A name in data.columns overrides a column of that name."""
    for ours, theirs in columns.items():
        if theirs not in row:
            raise InvalidExample(f"has no column {theirs!r}, which data.columns says is the {ours}; it has {_names(row)}")
    renamed = {our_name(name, row): value for name, value in row.items() if name not in columns.values()}
    renamed |= {ours: row[theirs] for ours, theirs in columns.items()}
    allowed = [format for format in formats if columns.keys() <= format.columns]
    present = {column for column, value in renamed.items() if value is not None}
    present -= set() if are_messages_with_parts(renamed.get("contents")) else {"contents"}
    matches = [format for format in allowed if present.issuperset(format.required)]
    matches = [format for format in matches if not any(set(format.required) < set(other.required) for other in matches)]
    if len(matches) == 1:
        return matches[0], renamed
    if matches:
        both = " and ".join("/".join(format.required) for format in matches)
        column = next(column for format in matches for column in format.required if column in COLUMNS)
        raise InvalidExample(f"could be read as {both}: keep the columns of one, or say which (data.columns.{column}={column})")
    if not allowed:
        if not columns:
            raise InvalidExample(
                "data.prompt and data.completion are for prompts and completions, and this objective has no such format"
            )
        raise InvalidExample(f"data.columns names {', '.join(columns)}, which no format has together")
    raise InvalidExample(_mismatch(renamed, allowed))


def our_name(name: str, row: dict[str, Any]) -> str:
    """`Prompt` or ` prompt` as `prompt`, if no other column is called so."""
    if name in COLUMNS or not isinstance(name, str):
        return name
    ours = name.strip().lower()
    alike = [other for other in row if isinstance(other, str) and other.strip().lower() == ours]
    return ours if ours in COLUMNS and len(alike) == 1 else name


def _mismatch(row: dict[str, Any], formats: list[Format]) -> str:
    """Why a row matches none of these formats, and what to do."""
    partial = [
        format for format in formats if row.keys() & {*format.required} and any(row.get(c) is None for c in format.required)
    ]
    named = {str(name).lower(): name for name in row}
    if partial:
        closest = max(partial, key=lambda format: sum(row.get(column) is not None for column in format.required))
        absent = next(column for column in closest.required if row.get(column) is None)
        present = [column for column in closest.required if row.get(column) is not None]
        beside = f" beside {', '.join(present)}" if present else ""
        if absent in row:
            return f"column {absent!r} is null{beside}; the example has {_names(row)}"
        others = {low: name for low, name in named.items() if name not in closest.columns}
        synonym = next((_first(names, others) for names in (PROMPTS, COMPLETIONS) if absent in names), None)
        near = synonym or next((others[low] for low in difflib.get_close_matches(absent, others, n=1)), None)
        pair = _as_pair(named, formats)
        hint = f" (is it {near!r}? Then set data.columns.{absent}={near})" if near else f" (set{pair})" if pair else ""
        return f"column {absent!r} is missing{beside}{hint}; the example has {_names(row)}"
    known = "; ".join(", ".join(format.required) for format in formats)
    two = dict(zip(("question", "answer"), named.values(), strict=True)) if len(named) == 2 else {}
    setting = _as_pair(named, formats) or _as_pair(two, formats) or " data.columns.prompt=question"
    return f"has {_names(row)}, which matches no supported format ({known}). Name them with data.columns, e.g.{setting}"


def _as_pair(named: Mapping[str, str], formats: Sequence[Format]) -> str:
    """The setting that reads two columns as a prompt and its completion, if two look like it."""
    prompt, completion = _first(PROMPTS, named), _first(COMPLETIONS, named)
    if prompt is None or completion is None or ("prompt", "completion") not in [format.required for format in formats]:
        return ""
    return f" data.columns.prompt={prompt} data.columns.completion={completion}"


def _first(names: Iterable[str], named: Mapping[str, str]) -> str | None:
    return next((named[name] for name in names if name in named), None)


def _names(row: dict[str, Any]) -> str:
    return ", ".join(name or "a column without a name" for name in row) or "no columns"


def _conversation(row: dict[str, Any], where: str, messages: list[Message], **more: Any) -> Conversation:
    switches = read_switches(row.get("chat_template_kwargs"))
    tools = row["functions"] if row.get("tools") in (None, "", []) and "functions" in row else row.get("tools")
    return Conversation(tuple(with_results_linked(messages)), where, read_tools(tools), switches=switches, **more)


def _system(row: dict[str, Any], messages: Sequence[Message] = (), column: str = "") -> list[Message]:
    """The message of the column `system`, if there is one, to be put before the messages of another column."""
    given = {name: system_parts(row[name]) for name in ("system", *GEMINI) if row.get(name) not in (None, "")}
    if not given:
        return []
    (name, system), *more = given.items()
    others = [*dict(more), *([f"a system message in {column}"] if messages and messages[0]["role"] == "system" else [])]
    if others:
        raise InvalidExample(f"has a column {name} and {others[0]}: leave one out, for example with data.ignore=[{name}]")
    return [{"role": "system", "content": text_of(system, name)}]


def _turns(column: str) -> Callable[[dict[str, Any], str], Example]:
    """How to read a row whose messages are in this column."""

    def read(row: dict[str, Any], where: str) -> Example:
        messages, weights = read_messages(row[column], column)
        system = _system(row, messages, column)
        return _conversation(row, where, system + messages, weights={n + len(system): w for n, w in weights.items()})

    return read


def _alpaca(row: dict[str, Any], where: str) -> Example:
    messages = _system(row)
    history = row.get("history") or []
    for number, pair in enumerate(history if isinstance(history, list) else [history]):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise InvalidExample(f"history[{number}] is not a pair of question and answer")
        messages.append({"role": "user", "content": text_of(pair[0], f"history[{number}][0]")})
        messages.append({"role": "assistant", "content": text_of(pair[1], f"history[{number}][1]")})
    question = text_of(row["instruction"], "instruction")
    details = row.get("input")
    if details is not None and text_of(details, "input", empty=True).strip():
        question = f"{question}\n{details}"
    messages.append({"role": "user", "content": question})
    messages.append({"role": "assistant", "content": text_of(row["output"], "output")})
    return _conversation(row, where, messages)


def _prompt_completion(row: dict[str, Any], where: str) -> Example:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) or isinstance(completion, list):
        before, weights = read_messages(prompt, "prompt")
        after, of_completion = read_messages(completion, "completion")
        system = _system(row, before, "prompt")
        weights |= {n + len(before): weight for n, weight in of_completion.items()}
        weights = {n + len(system): weight for n, weight in weights.items()}
        before = system + before
        return _conversation(row, where, before + after, weights=weights, prompt=len(before))
    messages = [
        *_system(row),
        {"role": "user", "content": text_of(prompt, "prompt")},
        {"role": "assistant", "content": text_of(completion, "completion")},
    ]
    return _conversation(row, where, messages, prompt=len(messages) - 1, is_completion=len(messages) == 2)


def _text(row: dict[str, Any], where: str) -> Example:
    return Text(text_of(row["text"], "text"), where)


ANSWERS = (
    Format(("messages",), OF_ANY, _turns("messages")),
    Format(("conversations",), OF_ANY, _turns("conversations")),
    Format(("contents",), OF_ANY, _turns("contents")),
    Format(("instruction", "output"), ("input", "history", *OF_ANY), _alpaca),
    Format(("prompt", "completion"), OF_ANY, _prompt_completion),
    Format(("text",), (), _text),
)
