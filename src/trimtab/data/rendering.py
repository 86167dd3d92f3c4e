"""Examples as rendered texts, and the answers in them that are trained on."""

import re
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple, Protocol

from trimtab.core.chat import Message, common_length
from trimtab.core.errors import DataError
from trimtab.data.example import Conversation, InvalidExample
from trimtab.data.template_output import REASONING, Template, explain_ignored, ignored_key, split_reasoning
from trimtab.data.turns import Turn


class Tokenizing(Protocol):
    """What a base offers to turn examples into tokens. See `base.Base`."""

    @property
    def tokenizer(self) -> Any: ...
    @property
    def tokenizing_hash(self) -> str: ...
    @property
    def has_template(self) -> bool: ...
    @property
    def template(self) -> Template: ...
    @property
    def end_of_text(self) -> int | None: ...
    @property
    def stop_ids(self) -> tuple[int, ...]: ...
    @property
    def control_tokens(self) -> tuple[str, ...]: ...
    def encode(self, texts: Sequence[str], *, special: bool = False) -> Sequence[Any]: ...
    def embedding_problem(self, ids: Sequence[int]) -> str | None: ...
    def decode(self, ids: Sequence[int]) -> str: ...


NO_CALLS = "messages[{}] (assistant): the model's chat template leaves out its tool_calls"
NO_END = (
    "the model's chat template ends an assistant turn with no special token, so the model could not learn to stop; "
    "use a template that does, or prompt/completion examples with a base that has no template"
)


class NotAPrefix(Exception):
    """Text or tokens before an answer change once the conversation continues (Qwen3 drops earlier thinking, for one)."""


class Answer(NamedTuple):
    start: int
    """Index of its first character in the text."""
    limit: int
    """Index of the first character that differs from what the model itself would have generated."""
    end: int | None = None
    """The token that ends it; unless given, the end of the text does."""
    calls: bool = False
    """It calls tools; the token may end each call."""


class RenderedText(NamedTuple):
    """A text to be tokenized, and the answers in it."""

    text: str
    answers: list[Answer]

    @property
    def by_template(self) -> bool:
        return self.answers[0].end is not None


def render_whole(example: Conversation, base: Tokenizing) -> list[RenderedText]:
    """The example as one text. Raises NotAPrefix if it has to be rendered turn by turn, and InvalidExample."""
    if not base.has_template:
        return [_render_completion(example, base)]
    template, messages, last = template_of(example, base), template_messages(example, base), len(example.messages) - 1
    _check_conversation(example, base)
    text = template.render(messages, example.tools)
    turns = {n: Turn(template, messages, n, example.tools) for n in trained_turns(example)}
    _check_nothing_ignored(example, messages, [text, *(turn.prompt for turn in turns.values())], base)
    if messages[last]["role"] == "assistant" and (ending := template.ending_of(messages[last])) is not None:
        text += ending.text
    answers = []
    for n, turn in turns.items():
        answer, start = turn.answer(text if n == last else None), len(turn.prompt)
        if not text.startswith(turn.prompt):
            raise NotAPrefix
        limit = len(text) if n == last else start + common_length(answer, text[start:])
        answers.append(Answer(start, limit, turn.ending.token, turn.calls))
    return [RenderedText(text, answers)]


def render_turn_by_turn(example: Conversation, base: Tokenizing) -> list[RenderedText]:
    """A text for each trained turn that ends with it, as the model has it when it generates that turn."""
    texts, template, messages = [], template_of(example, base), template_messages(example, base)
    for n in trained_turns(example):
        turn = Turn(template, messages, n, example.tools)
        text = turn.prompt + turn.answer()
        texts.append(RenderedText(text, [Answer(len(turn.prompt), len(text), turn.ending.token, turn.calls)]))
    return texts


def trained_turns(example: Conversation) -> list[int]:
    """Indices of the messages that are trained on."""
    return [n for n, m in enumerate(example.messages) if m["role"] == "assistant" and n not in example.context_only]


def _render_completion(example: Conversation, base: Tokenizing) -> RenderedText:
    """Prompt and completion as plain text, of which the second continues the first."""
    if not example.is_completion:
        raise InvalidExample(
            "is a conversation, and this model has no chat template to write it with. Either give it one (model.chat_template: a file with the "
            "template of a model that was trained like it), or give prompt/completion or text examples, which a base model reads as they are"
        )
    if example.switches:
        raise InvalidExample(
            "has chat_template_kwargs, and this model has no chat template: ignore the column with data.ignore=[chat_template_kwargs]"
        )
    if base.end_of_text is None:
        raise InvalidExample("the tokenizer has no end-of-text token, so the model could not learn to stop: set its eos_token")
    prompt, completion = (message["content"] for message in example.messages)
    return RenderedText(prompt + completion, [Answer(len(prompt), len(prompt) + len(completion))])


def template_of(example: Conversation, base: Tokenizing) -> Template:
    """The base's chat template with the switches that the example sets. Raises DataError for one that it does not read."""
    return base.template.with_switches(example.switches)


def template_messages(example: Conversation, base: Tokenizing) -> list[Message]:
    """The messages as the template reads them: reasoning at the beginning of a content is moved to the key that it reads."""
    template = template_of(example, base)
    if not template.reads_reasoning:
        return list(example.messages)
    return [
        _with_reasoning_key(message, template.opens_reasoning) if message["role"] == "assistant" else message
        for message in example.messages
    ]


def _with_reasoning_key(message: Message, opened: bool) -> Message:
    if any(message.get(key) for key in REASONING):
        return message
    reasoning, rest = split_reasoning(message, opened=opened)
    return {**rest, "reasoning_content": reasoning} if reasoning else rest


def _check_conversation(example: Conversation, base: Tokenizing) -> None:
    if trained_turns(example)[0] == 0:
        raise InvalidExample("messages[0] is the assistant's, without a prompt: begin with another role, or give it weight 0")
    template = template_of(example, base)
    for n in trained_turns(example):
        if template.ending_of(example.messages[n]) is None:
            template.render(example.messages[: n + 1], example.tools)  # the template may say why
            raise InvalidExample(NO_CALLS.format(n) if example.messages[n].get("tool_calls") else NO_END)
    named = {f"messages[{n}] ({message['role']})": message for n, message in enumerate(example.messages)}
    for name, value in {**named, "tools": example.tools}.items():
        for text in _texts(value):
            if token := _any_of(base.control_tokens).search(text):
                raise InvalidExample(f"{name} holds the model's control token {token.group()} as text")


def _texts(value: Any) -> Iterator[str]:
    """Every text in a value, keys included."""
    values = [value]
    while values:
        value = values.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            values += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple):
            values += value


@cache
def _any_of(texts: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, texts)) or "(?!)")


def _check_nothing_ignored(example: Conversation, messages: list[Message], texts: list[str], base: Tokenizing) -> None:
    """Raise InvalidExample for what the template silently ignores: the model would be trained on another conversation.

    Args:
        texts: The conversation as the template writes it, and the prompt of each trained turn.
    """

    template = template_of(example, base)

    def rendered(messages: Sequence[Message], tools: Any) -> str | None:
        try:
            return template.render(messages, tools)
        except DataError:
            return None

    if example.tools and rendered(messages, None) == texts[0]:
        raise InvalidExample(
            "the model's chat template leaves out tools: remove them, or use a model whose template writes them"
        )
    trained = set(trained_turns(example))
    for n, message in enumerate(messages):
        changes: dict[str, Any] = {"tool_calls": []} if message.get("tool_calls") else {}
        content = message["content"].strip()
        if n not in trained and all(content not in text for text in texts):  # `check_answer` covers those that are trained on
            changes["content"] = message["content"] + "."
        for key, value in changes.items():
            changed = [*messages[:n], {**message, key: value}, *messages[n + 1 :]]
            if rendered(changed, example.tools) == texts[0]:
                raise InvalidExample(f"messages[{n}] ({message['role']}): the model's chat template leaves out its {key}")
        if ignored := ignored_key(messages, n, n in trained, lambda talk: template.render(talk, example.tools)):
            raise InvalidExample(f"messages[{n}] ({message['role']}): {explain_ignored(ignored, template)}")
