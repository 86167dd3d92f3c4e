"""Examples as drafts: the texts that they are written as, and where in them the model speaks."""

import re
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple, Protocol

from trimtab.core.errors import DataError
from trimtab.data.example import Conversation, Refused, Text
from trimtab.data.template_output import REASONING, about, parted, unread_key
from trimtab.data.turns import Turn, shared_length

Message = dict[str, Any]


class Tokenizing(Protocol):
    """What a base offers to turn examples into tokens. See `base.Base`."""

    @property
    def tokenizing_hash(self) -> str: ...
    @property
    def has_template(self) -> bool: ...
    @property
    def template(self) -> Any: ...
    @property
    def end_of_text(self) -> int | None: ...
    @property
    def control_tokens(self) -> tuple[str, ...]: ...
    def ending(self, message: Message) -> Any: ...
    def render(self, messages: Sequence[Message], tools: Sequence[Any] | None = None, *, prompt: bool = False) -> str: ...
    def encode(self, texts: Sequence[str], *, special: bool = False) -> Sequence[Any]: ...
    def unembedded(self, ids: Sequence[int]) -> str | None: ...
    def decode(self, ids: Sequence[int]) -> str: ...


NO_CALLS = "messages[{}] (assistant): the model's chat template leaves out its tool_calls"
NO_END = (
    "the model's chat template ends an assistant turn with no special token, so the model could not learn to stop; "
    "give it a template that does, or use prompt/completion rows with a base that has no template"
)


class NotAPrefix(Exception):
    """Text or tokens before an answer change once the conversation goes on (Qwen3 drops earlier thinking, for one)."""


class Answer(NamedTuple):
    start: int
    """Where it starts in the text, in characters."""
    limit: int
    """Up to where the text is what the model itself would have had before it and said."""
    end: int | None = None
    """The token that ends it; the text's end does unless given."""
    calls: bool = False
    """It calls tools; the token may end each call."""


class RenderedText(NamedTuple):
    """A text to be tokenized, and the answers in it."""

    text: str
    answers: list[Answer]

    @property
    def in_turns(self) -> bool:
        """Written by the chat template."""
        return self.answers[0].end is not None


def whole(example: Conversation | Text, base: Tokenizing) -> list[RenderedText]:
    """The example as one text."""
    if isinstance(example, Text):
        return [RenderedText(example.text, [Answer(0, len(example.text))])]
    if not base.has_template:
        prompt, completion = joined(example, base)
        return [RenderedText(prompt + completion, [Answer(len(prompt), len(prompt) + len(completion))])]
    messages, last = read_so(example, base), len(example.messages) - 1
    _check_conversation(example, base)
    text = base.render(messages, example.tools)
    turns = {n: Turn(base.template, messages, n, example.tools) for n in trained_turns(example)}
    _check_written(example, messages, [text, *(turn.prompt for turn in turns.values())], base)
    if messages[last]["role"] == "assistant" and (ending := base.ending(messages[last])) is not None:
        text += ending.text
    answers = []
    for n, turn in turns.items():
        said, start = turn.said(text if n == last else None), len(turn.prompt)
        if not text.startswith(turn.prompt):
            raise NotAPrefix
        limit = len(text) if n == last else start + shared_length(said, text[start:])
        answers.append(Answer(start, limit, turn.ending.token, turn.calls))
    return [RenderedText(text, answers)]


def turn_by_turn(example: Conversation | Text, base: Tokenizing) -> list[RenderedText]:
    """Each trained turn in a text of its own that ends with it, as the model has it when it speaks."""
    assert isinstance(example, Conversation)
    drafts, messages = [], read_so(example, base)
    for n in trained_turns(example):
        turn = Turn(base.template, messages, n, example.tools)
        text = turn.prompt + turn.said()
        drafts.append(RenderedText(text, [Answer(len(turn.prompt), len(text), turn.ending.token, turn.calls)]))
    return drafts


def trained_turns(example: Conversation) -> list[int]:
    """Indices of the messages that are trained on."""
    return [n for n, m in enumerate(example.messages) if m["role"] == "assistant" and n not in example.silent]


def joined(example: Conversation, base: Tokenizing) -> tuple[str, str]:
    """Prompt and completion as plain texts, of which the second continues the first."""
    if not example.continues:
        raise Refused(
            "is a conversation, and this model has no chat template to write it with: use prompt/completion or text rows"
        )
    if base.end_of_text is None:
        raise Refused("the tokenizer has no end-of-text token, so the model could not learn to stop: set its eos_token")
    return example.messages[0]["content"], example.messages[1]["content"]


def read_so(example: Conversation, base: Tokenizing) -> list[Message]:
    """The messages as the template reads them: reasoning that a content begins with goes where the template looks for it."""
    if not base.template.reads_reasoning:
        return list(example.messages)
    return [
        _with_reasoning(message, base.template.opens_reasoning) if message["role"] == "assistant" else message
        for message in example.messages
    ]


def _with_reasoning(message: Message, opened: bool) -> Message:
    if any(message.get(key) for key in REASONING):
        return message
    reasoning, rest = parted(message, opened=opened)
    return {**rest, "reasoning_content": reasoning} if reasoning else rest


def _check_conversation(example: Conversation, base: Tokenizing) -> None:
    if trained_turns(example)[0] == 0:
        raise Refused("messages[0] is the assistant's, and nothing asks for it: begin with another, or give it weight 0")
    for n in trained_turns(example):
        if base.ending(example.messages[n]) is None:
            base.render(example.messages[: n + 1], example.tools)  # the template may say why
            raise Refused(NO_CALLS.format(n) if example.messages[n].get("tool_calls") else NO_END)
    named = {f"messages[{n}] ({message['role']})": message for n, message in enumerate(example.messages)}
    for name, value in {**named, "tools": example.tools}.items():
        for text in _texts(value):
            if found := _any_of(base.control_tokens).search(text):
                raise Refused(f"{name} holds the model's control token {found.group()} as text")


def _texts(value: Any) -> Iterator[str]:
    """Every text in a value."""
    within = [value]
    while within:
        one = within.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, dict):
            within += [*one.keys(), *one.values()]
        elif isinstance(one, list | tuple):
            within += one


@cache
def _any_of(texts: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, texts)) or "(?!)")


def _check_written(example: Conversation, messages: list[Message], texts: list[str], base: Tokenizing) -> None:
    """Refuse what the template passes over silently: the model would learn another conversation than the row's.

    Args:
        texts: The conversation as it is written, and each prompt.
    """

    def written_as(messages: Sequence[Message], tools: Any) -> str | None:
        try:
            return base.render(messages, tools)
        except DataError:
            return None

    if example.tools and written_as(messages, None) == texts[0]:
        raise Refused("the model's chat template leaves out tools: remove them, or use a model whose template writes them")
    trained = set(trained_turns(example))
    for n, message in enumerate(messages):
        changes: dict[str, Any] = {"tool_calls": []} if message.get("tool_calls") else {}
        content = message["content"].strip()
        if n not in trained and all(content not in text for text in texts):  # of those that are trained on, see `written`
            changes["content"] = message["content"] + "."
        for key, value in changes.items():
            changed = [*messages[:n], {**message, key: value}, *messages[n + 1 :]]
            if written_as(changed, example.tools) == texts[0]:
                raise Refused(f"messages[{n}] ({message['role']}): the model's chat template leaves out its {key}")
        if unread := unread_key(messages, n, n in trained, lambda some: base.render(some, example.tools)):
            raise Refused(f"messages[{n}] ({message['role']}): {about(unread, base.template)}")
