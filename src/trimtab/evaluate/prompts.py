"""Prompts to be answered, read from everything that training reads, with the answers or without them.

A row without an answer is read as training reads one that has: with a mark in the answer's place, which is taken out again. So there
is no second way to read a format.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from trimtab.core.chat import Message
from trimtab.core.errors import DataError
from trimtab.data.config import DataConfig
from trimtab.data.example import Conversation, Example, InvalidExample, RawRow, RejectedExample, SourceReport, Text
from trimtab.data.exported_messages import are_messages_with_parts
from trimtab.data.formats import our_name, read_examples
from trimtab.data.read import read_rows
from trimtab.data.rendering import Tokenizing, check_texts, template_messages
from trimtab.data.source import Source
from trimtab.data.system_message import SystemMessage
from trimtab.data.token_rows import tokenize_prompt

MARK = "qxanswerxq"
"""In the place of an answer."""
ANSWERS = ("output", "completion", "chosen", "rejected", "label", "kto_tag")
"""Columns that hold answers, and judgements of them."""


class Prompt(NamedTuple):
    """What the model is asked, and the answer that the data has, if any."""

    example: Conversation
    """Without the answer."""
    expected: str | None = None

    @property
    def where(self) -> str:
        return self.example.where


def prompts_of(config: DataConfig) -> Iterator[Prompt | RejectedExample]:
    """The prompts of the sources that a config names, read lazily and in their order, and the rows that hold none.

    Raises:
        DataError: A source can't be read at all.
    """
    for sources in config.train_sources.values():
        for source in sources:
            for row in read_rows(source, SourceReport((source.path,)), None):
                yield row if isinstance(row, RejectedExample) else _prompt(row, config)


def prompt_source(path: str, config: DataConfig) -> DataConfig:
    """The config with this source alone."""
    return config.model_copy(update={"train": {"": Source(path=path)}, "eval": 0})


def _prompt(row: RawRow, config: DataConfig) -> Prompt | RejectedExample:
    """The prompt of a row, read as training reads it; with its columns' own names if nothing fits."""
    first: RejectedExample | None = None
    for reading in (config, config.model_copy(update={"columns": {}, "prompt": None, "completion": None})):
        found = _read(row, reading, reading.columns, reading.templates)
        if isinstance(found, RejectedExample):
            columns = {ours: theirs for ours, theirs in reading.columns.items() if ours not in ANSWERS}
            templates = {name: template for name, template in reading.templates.items() if name not in ANSWERS}
            try:
                found = _read((row[0], _with_mark(row[1], columns, templates)), reading, columns, templates)
            except InvalidExample as invalid:
                found = RejectedExample(row[0], str(invalid))
        if not isinstance(found, RejectedExample):
            return _of_example(found)
        first = first or found
    assert first is not None
    return first


def _read(
    row: RawRow, reading: DataConfig, columns: Mapping[Any, str], templates: Mapping[str, str]
) -> Example | RejectedExample:
    report, system = SourceReport(()), SystemMessage(reading.system, reading.drop_system)
    found = next(read_examples([row], columns, report, None, reading.ignore, templates, system, "last"), None)
    return found if found is not None else report.rejected[0]


def _with_mark(row: Mapping[str, Any], columns: Mapping[Any, str], templates: Mapping[str, str]) -> dict[str, Any]:
    """A row without its answers, and with the mark in their place. Raises InvalidExample for one without a prompt."""
    ours = {theirs: name for name, theirs in columns.items()}
    named = {ours.get(name) or our_name(name, dict(row)): name for name in row}
    kept = {name: value for name, value in row.items() if our_name(name, dict(row)) not in ANSWERS}
    answer = {"role": "assistant", "content": MARK}
    if are_messages_with_parts(row.get("contents")):
        return {**kept, "contents": [*row["contents"], {"role": "model", "parts": [{"text": MARK}]}]}
    for column in ("messages", "conversations"):
        if column in named:
            raw = row[named[column]]
            return {**kept, named[column]: [*raw, answer] if raw and isinstance(raw, list) else raw}
    if "instruction" in named:
        return {**kept, "output": MARK}
    if "prompt" in named or "prompt" in templates:
        listed = "prompt" in named and isinstance(row[named["prompt"]], list)
        return {**kept, "completion": [answer] if listed else MARK}
    if isinstance(row.get("chosen"), list):
        return {**kept, "messages": row["chosen"]}
    names = ", ".join(map(str, row)) or "no columns"
    raise InvalidExample(
        f"has {names}, and none of them is a prompt (messages, conversations, contents, instruction, prompt or text). Name it, e.g. "
        "data.columns.prompt=question"
    )


def _of_example(example: Example) -> Prompt | RejectedExample:
    if isinstance(example, Text):
        message: Message = {"role": "user", "content": example.text}
        return Prompt(Conversation((message,), example.where, prompt=1, is_completion=True))
    assert isinstance(example, Conversation), "one of the formats with answers"
    *before, last = example.messages
    if last["role"] != "assistant":
        return Prompt(example)
    if not before:
        return RejectedExample(example.where, "begins with the answer, without a prompt")
    expected = None if last["content"] in (MARK, "") else last["content"]  # a call of a tool is no text
    return Prompt(replace(example, messages=tuple(before), weights={}), expected)


def tokenize_question(prompt: Prompt, base: Tokenizing, most: int | None) -> list[int]:
    """The tokens of a prompt, as training has them before the answer.

    Args:
        most: The tokens that the context has for prompt and answer.

    Raises:
        InvalidExample: The model can't be asked that.
    """
    example = prompt.example
    if not base.has_template and len(example.messages) != 1:
        raise InvalidExample("is a conversation, and this model has no chat template: it continues a single text")
    check_texts(example, base)
    try:
        messages = template_messages(example, base) if base.has_template else example.messages
        ids = tokenize_prompt(messages, base, example.tools, example.switches)
    except DataError as error:
        raise InvalidExample(str(error)) from None
    if not ids or (most is not None and len(ids) >= most):
        raise InvalidExample(f"has a prompt of {len(ids):,} tokens, and the context has {most or 0:,} for prompt and answer")
    return ids
