"""Examples as drafts: the texts that they are written as, and where in them the model speaks."""

import re
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from functools import cache
from typing import Any, NamedTuple, Protocol

from trimtab.data.example import Conversation, Text
from trimtab.errors import DataError


class Tokenizing(Protocol):
    """What a base offers to turn examples into tokens. See `base.Base`."""

    @property
    def tokenizing_hash(self) -> str | None: ...
    @property
    def has_template(self) -> bool: ...
    @property
    def end_of_turn(self) -> int | None: ...
    @property
    def end_of_text(self) -> int | None: ...
    @property
    def control_tokens(self) -> tuple[str, ...]: ...
    def render(
        self, messages: SequenceOf[dict[str, Any]], tools: SequenceOf[Any] | None = None, *, prompt: bool = False
    ) -> str: ...
    def encode(self, texts: SequenceOf[str], *, special: bool = False) -> SequenceOf[Any]: ...
    def unembedded(self, ids: SequenceOf[int]) -> str | None: ...
    def decode(self, ids: SequenceOf[int]) -> str: ...


class Refused(Exception):
    """Why this row can't be used; becomes a Refusal with the row's place."""


class NotAPrefix(Exception):
    """Text or tokens before an answer change once the conversation goes on (Qwen3 drops earlier thinking, for one)."""


class Answer(NamedTuple):
    start: int
    """Where it starts in the text, in characters."""
    limit: int
    """Up to where the text is what the model itself would have had before it and said."""


class Draft(NamedTuple):
    """A text to be tokenized, and the answers in it."""

    text: str
    answers: list[Answer]
    in_turns: bool
    """Written by the chat template, so that an end-of-turn token ends an answer; else the text's end does."""


def whole(example: Conversation | Text, base: Tokenizing) -> list[Draft]:
    """The example as one text."""
    if isinstance(example, Text):
        return [Draft(example.text, [Answer(0, len(example.text))], in_turns=False)]
    if not base.has_template:
        prompt, completion = joined(example, base)
        return [Draft(prompt + completion, [Answer(len(prompt), len(prompt) + len(completion))], in_turns=False)]
    _check_conversation(example, base)
    text = base.render(example.messages, example.tools)
    _check_written(example, text, base)
    return [Draft(text, [_answer(example, turn, text, base) for turn in learned_turns(example)], in_turns=True)]


def turn_by_turn(example: Conversation | Text, base: Tokenizing) -> list[Draft]:
    """Each learned turn in a text of its own that ends with it, as the model has it when it speaks."""
    assert isinstance(example, Conversation)
    drafts = []
    for turn in learned_turns(example):
        text = base.render(example.messages[: turn + 1], example.tools)
        try:
            drafts.append(Draft(text, [_answer(example, turn, text, base)], in_turns=True))
        except NotAPrefix:
            raise Refused(
                f"messages[{turn}]: the chat template does not write this conversation's prompt the way it begins the same "
                "conversation with its answer, so training would not see what generation sees"
            ) from None
    return drafts


def learned_turns(example: Conversation) -> list[int]:
    """Indices of the messages that are learned."""
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


def _answer(example: Conversation, turn: int, text: str, base: Tokenizing) -> Answer:
    prompt = base.render(example.messages[:turn], example.tools, prompt=True)
    if not text.startswith(prompt):
        raise NotAPrefix
    start = len(prompt)
    if turn == len(example.messages) - 1:
        return Answer(start, len(text))
    said = base.render(example.messages[: turn + 1], example.tools)[start:]
    agreeing = (n for n, (a, b) in enumerate(zip(said, text[start:], strict=False)) if a != b)
    return Answer(start, start + next(agreeing, min(len(said), len(text) - start)))


def _check_conversation(example: Conversation, base: Tokenizing) -> None:
    if base.end_of_turn is None:
        raise Refused(
            "the model's chat template ends an assistant turn with no special token, so the model could not learn to stop; "
            "give it a template that does, or use prompt/completion rows with a base that has no template"
        )
    if learned_turns(example)[0] == 0:
        raise Refused("messages[0] is the assistant's, and nothing asks for it: begin with another, or give it weight 0")
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


def _check_written(example: Conversation, text: str, base: Tokenizing) -> None:
    """Refuse what the template passes over in silence: the model would learn another conversation than the row's."""

    def written_as(messages: SequenceOf[dict[str, Any]], tools: Any) -> str | None:
        try:
            return base.render(messages, tools)
        except DataError:
            return None

    if example.tools and written_as(example.messages, None) == text:
        raise Refused("the model's chat template leaves out tools: remove them, or use a model whose template writes them")
    for n, message in enumerate(example.messages):
        changes: dict[str, Any] = {"tool_calls": []} if message.get("tool_calls") else {}
        if message["content"].strip() not in text:
            changes["content"] = message["content"] + "."
        for key, value in changes.items():
            changed = [*example.messages[:n], {**message, key: value}, *example.messages[n + 1 :]]
            if written_as(changed, example.tools) == text:
                raise Refused(f"messages[{n}] ({message['role']}): the model's chat template leaves out its {key}")
