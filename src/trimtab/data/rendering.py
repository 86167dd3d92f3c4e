"""Examples as rendered texts, and the answers in them that are trained on."""

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple, Protocol

from trimtab.core.chat import Message, common_length
from trimtab.core.errors import DataError
from trimtab.data.example import Conversation, InvalidExample
from trimtab.data.template_output import REASONING, Template, explain_ignored, ignored_key, split_reasoning
from trimtab.data.trained import check_trained, message_weights, other_trained, trained_turns
from trimtab.data.turns import OtherTurn, Turn, find_other_turn


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


OWN_WEIGHT = (
    "has a message with a weight of its own, and the model's chat template writes the last answer differently than generation does, so with "
    "data.train_on=everything its place is not known: use a list of roles, such as [system, user, assistant, tool]"
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
    weight: float = 1.0


class RenderedText(NamedTuple):
    """A text to be tokenized, and what is trained on in it."""

    text: str
    answers: list[Answer]
    others: Sequence[OtherTurn] = ()
    """Turns of other roles."""
    rest: float = 0.0
    """The weight of every token that belongs to none of these."""
    by_template: bool = True


def render_whole(example: Conversation, base: Tokenizing) -> list[RenderedText]:
    """The example as one text. Raises NotAPrefix if it has to be rendered turn by turn, and InvalidExample."""
    check_trained(example)
    if not base.has_template:
        return [_render_completion(example, base)]
    if example.train_on == "everything":
        return [_render_everything(example, base)]
    template, messages, last = template_of(example, base), template_messages(example, base), len(example.messages) - 1
    _check_conversation(example, base)
    text = template.render(messages, example.tools)
    turns = {n: Turn(template, messages, n, example.tools) for n in trained_turns(example)}
    _check_nothing_ignored(example, messages, [text, *(turn.prompt for turn in turns.values())], base)
    others = _others(example, base, other_trained(example), text, last + 1)
    if messages[last]["role"] == "assistant" and (ending := template.ending_of(messages[last])) is not None:
        text += ending.text
    answers, weights = [], message_weights(example)
    for n, turn in turns.items():
        answer, start = turn.answer(text if n == last else None), len(turn.prompt)
        if not text.startswith(turn.prompt):
            raise NotAPrefix
        limit = len(text) if n == last else start + common_length(answer, text[start:])
        answers.append(Answer(start, limit, turn.ending.token, turn.calls, weights[n]))
    return [RenderedText(text, answers, others)]


def _render_everything(example: Conversation, base: Tokenizing) -> RenderedText:
    """All that the template writes, with the last answer after the prompt that generation uses, as all answers are elsewhere."""
    template, messages, last = template_of(example, base), template_messages(example, base), len(example.messages) - 1
    weights, answers = message_weights(example), list[Answer]()
    check_texts(example, base)
    text = template.render(messages, example.tools)
    ends_with_answer = last > 0 and messages[last]["role"] == "assistant"
    turn = Turn(template, messages, last, example.tools) if ends_with_answer else None
    _check_nothing_ignored(example, messages, [text, *([turn.prompt] if turn else [])], base, {last} if turn else set())
    others = _others(
        example, base, [n for n in range(last + 1) if weights[n] != 1 and not (turn and n == last)], text, last + 1
    )
    if turn is not None:
        _check_ends(example, base, last)
        whole = turn.prompt + turn.answer(text + turn.ending.text)
        if others and not whole.startswith(text):
            raise InvalidExample(OWN_WEIGHT)
        answers.append(Answer(len(turn.prompt), len(whole), turn.ending.token, turn.calls, weights[last]))
        text = whole
    return RenderedText(text, answers, others, rest=1.0)


def render_turn_by_turn(example: Conversation, base: Tokenizing) -> list[RenderedText]:
    """A text for each trained turn that ends with it, as the model has it when it generates that turn; turns of other roles are in the
    first one that has them."""
    if example.train_on == "everything":
        raise NotAPrefix  # it is one text, in which earlier answers stand as they stand before the last one
    texts, template, messages = [], template_of(example, base), template_messages(example, base)
    weights, others, before = message_weights(example), other_trained(example), 0
    for n in trained_turns(example):
        turn = Turn(template, messages, n, example.tools)
        text = turn.prompt + turn.answer()
        new = _others(example, base, [other for other in others if before <= other < n], turn.prompt, n, prompt=True)
        answer = Answer(len(turn.prompt), len(text), turn.ending.token, turn.calls, weights[n])
        texts.append(RenderedText(text, [answer], new))
        before = n
    if rest := [other for other in others if other > before]:
        text = template.render(messages, example.tools)
        texts.append(RenderedText(text, [], _others(example, base, rest, text, len(messages))))
    return texts


def _others(
    example: Conversation, base: Tokenizing, numbers: Iterable[int], text: str, length: int, prompt: bool = False
) -> list[OtherTurn]:
    """Where these messages are in the text of the first so many messages. Raises InvalidExample."""
    template, messages, weights = template_of(example, base), template_messages(example, base), message_weights(example)
    ends = _any_of(base.control_tokens)
    return [
        find_other_turn(template, messages[:length], n, example.tools, text, ends, prompt)._replace(weight=weights[n])
        for n in numbers
    ]


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
    text, (of_prompt, of_completion) = prompt + completion, message_weights(example)
    answers = [Answer(len(prompt), len(text), weight=of_completion)] if of_completion else []
    others = [OtherTurn(0, len(prompt), of_prompt)] if of_prompt else []
    return RenderedText(text, answers, others, by_template=False)


def template_of(example: Conversation, base: Tokenizing) -> Template:
    """The base's chat template for the example's tools, with the switches that it sets. Raises DataError for one that it does not read."""
    return base.template.chosen(example.tools, example.switches)


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
    if 0 in trained_turns(example):
        raise InvalidExample("messages[0] is the assistant's, without a prompt: begin with another role, or give it weight 0")
    for n in trained_turns(example):
        _check_ends(example, base, n)
    check_texts(example, base)


def _check_ends(example: Conversation, base: Tokenizing, number: int) -> None:
    """Raise InvalidExample for an assistant turn that the template ends with no special token."""
    template, message = template_of(example, base), example.messages[number]
    if template.ending_of(message) is None:
        template.render(example.messages[: number + 1], example.tools)  # the template may say why
        raise InvalidExample(NO_CALLS.format(number) if message.get("tool_calls") else NO_END)


def check_texts(example: Conversation, base: Tokenizing) -> None:
    """Raise InvalidExample for a control token in a text."""
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


def _check_nothing_ignored(
    example: Conversation, messages: list[Message], texts: list[str], base: Tokenizing, answers: Iterable[int] | None = None
) -> None:
    """Raise InvalidExample for what the template silently ignores: the model would be trained on another conversation.

    Args:
        texts: The conversation as the template writes it, and the prompt of each trained turn.
        answers: Indices of the trained turns, whose texts `check_answer` covers; all that are trained on unless given.
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
    trained = set(trained_turns(example) if answers is None else answers)
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
