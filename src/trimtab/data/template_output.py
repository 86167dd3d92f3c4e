"""A check that a rendered answer contains every text of its message, and besides only what the template writes around any text.

The message is rendered once more with marks in place of its texts. What the template writes between the marks must be what
it wrote between the texts, and a mark that is missing is a text that it leaves out.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple, Protocol

from trimtab.core.chat import CLOSES, OPENS, Message
from trimtab.core.errors import DataError
from trimtab.data.example import InvalidExample

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys of a message's reasoning; Transformers passes any of them on under the name that the template reads."""
_THINKING = re.compile(r"\s*(<think>)?(.*?)</think>(.*)", re.DOTALL)
_MARK = re.compile(r"qxmark([a-z]+?)xq")
MAX_FRAMES = 1000


class Leaf(NamedTuple):
    """A text of a message."""

    text: str
    name: str


class Template(Protocol):
    """What is used of a base's chat template. See `base.template.ChatTemplate`."""

    source: Any
    frames: set[tuple[str, ...]]

    @property
    def keeps_thinking(self) -> bool: ...
    @property
    def reads_reasoning(self) -> bool: ...
    @property
    def opens_reasoning(self) -> bool: ...
    def render(self, messages: Sequence[Message], tools: Sequence[Any] | None = None, *, prompt: bool = False) -> str: ...
    def ending_of(self, message: Message) -> Any: ...
    def switch_for(self, wanted: Any) -> str | None: ...
    def chosen(self, tools: Sequence[Any], switches: Mapping[str, Any]) -> "Template": ...


def split_reasoning(message: Message, *, opened: bool) -> tuple[str, Message]:
    """A message's reasoning, from its own key or from the beginning of the content; and the message without it.

    Args:
        opened: The prompt opens the reasoning, so that a content need not.
    """
    own = next((message[key] for key in REASONING if isinstance(message.get(key), str)), None)
    rest = {key: value for key, value in message.items() if key not in REASONING}
    if own is not None:
        return own, rest
    match = _THINKING.fullmatch(message["content"])
    if match is None or not (match[1] or opened) or OPENS in match[2] or CLOSES in match[3]:
        return "", rest
    return match[2].strip("\n"), {**rest, "content": match[3].lstrip("\n")}


def check_answer(message: Message, answer: str, render: Callable[[Message], str], template: Template) -> None:
    """Raise InvalidExample unless a rendered assistant message says exactly what the message says.

    Args:
        answer: The text that is trained on, from the end of the prompt on.
        render: Gives the same for another message in its place.

    Raises:
        InvalidExample: The template leaves out one of its texts, or writes it differently than others.
    """
    marked, leaves = _mark_texts(message, _tags(str(template.source)))
    if _frame_around(leaves, answer) in template.frames:
        return
    try:
        probe = render(marked)
    except DataError as error:
        raise InvalidExample(f"the chat template writes this message and not another in its place: {error}") from None
    order = [int(numeral.translate(_DIGITS)) for numeral in _MARK.findall(probe)]
    if missing := [leaf for number, leaf in enumerate(leaves) if number not in order]:
        name, text = missing[0].name, _short(missing[0].text)
        raise InvalidExample(
            explain_ignored(name, template) if name in REASONING else f"the model's chat template leaves out its {name}: {text}"
        )
    if len(set(order)) < len(order):
        repeated = next(leaf for number, leaf in enumerate(leaves) if order.count(number) > 1)
        raise InvalidExample(f"the model's chat template writes its {repeated.name} more than once: {_short(repeated.text)}")
    frame = tuple(_MARK.split(probe)[::2])
    _compare(answer, frame, [leaves[number] for number in order])
    calls = message.get("tool_calls") or []
    for call in calls:
        _check_call(call["function"], answer)
    if not calls and len(template.frames) < MAX_FRAMES:
        template.frames.add(frame)


def _frame_around(leaves: list[Leaf], answer: str) -> tuple[str, ...]:
    """What an answer has around these texts, each searched behind the one before; empty if one is missing."""
    frame, at = list[str](), 0
    for leaf in leaves:
        start = answer.find(leaf.text, at)
        if start < 0:
            return ()
        frame.append(answer[at:start])
        at = start + len(leaf.text)
    return (*frame, answer[at:])


def _compare(answer: str, frame: tuple[str, ...], leaves: list[Leaf]) -> None:
    """Raise InvalidExample unless an answer is these texts, in some notation, in this frame."""
    if not answer.startswith(frame[0]):
        raise InvalidExample(
            f"the model's chat template begins this turn as {_short(answer)}, and others as {_short(frame[0])}"
        )
    at = len(frame[0])
    for leaf, then in zip(leaves, frame[1:], strict=True):
        ends = (at + len(text) for text in notations(leaf.text) if answer.startswith(text, at))
        end = next((end for end in ends if answer.startswith(then, end)), None)
        if end is None:
            end = answer.find(then, at) if then else len(answer)
            if end < 0 or normalized(leaf.text) != normalized(answer[at:end]):
                raise InvalidExample(
                    f"the model's chat template does not write its {leaf.name} unchanged: {_short(leaf.text)} "
                    f"becomes {_short(answer[at:])}"
                )
        at = end + len(then)
    if at != len(answer):
        raise InvalidExample(f"the model's chat template ends this turn as {_short(answer[at:])}, and others do not")


def notations(text: str) -> Iterator[str]:
    """A text as templates may write it: unchanged, in JSON, Python or XML."""
    yield text
    yield json.dumps(text, ensure_ascii=False)[1:-1]
    yield json.dumps(text)[1:-1]
    yield repr(text)[1:-1]
    yield f"<![CDATA[{text}]]>"


def normalized(text: str) -> str:
    """A text without white space and backslashes, in which notations differ."""
    return re.sub(r"[\s\\]+", "", text)


def _check_call(function: dict[str, Any], answer: str) -> None:
    """Raise InvalidExample unless the names and numbers of a call are in the answer; marks can't replace them."""
    for name in (function["name"], *_names(function["arguments"])):
        if name not in answer:
            raise InvalidExample(f"the model's chat template leaves out {_short(name)} of the call of {function['name']}")


def _names(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _names(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _names(inner)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield json.dumps(value)


def _mark_texts(message: Message, tags: "re.Pattern[str]") -> tuple[Message, list[Leaf]]:
    """The message with marks in place of its texts, and these texts in the order of their marks."""
    leaves: list[Leaf] = []

    def mark(text: str, name: str) -> str:
        core = text.strip()
        if not core:
            return text
        leaves.append(Leaf(core, name))
        start = text.index(core)
        return f"{text[:start]}qxmark{str(len(leaves) - 1).translate(_LETTERS)}xq{text[start + len(core) :]}"

    def mark_inside(value: Any, name: str) -> Any:
        if isinstance(value, str):
            return mark(value, name)
        if isinstance(value, dict):
            return {key: mark_inside(inner, f"argument {key}") for key, inner in value.items()}
        return [mark_inside(inner, name) for inner in value] if isinstance(value, list) else value

    marked = dict(message)
    for key in REASONING:
        if isinstance(message.get(key), str):
            marked[key] = mark(message[key], key)
    # Tags that the template may look for in a text stay: `</think>`, for one.
    parts = tags.split(message["content"])
    marked["content"] = "".join(mark(part, "content") if n % 2 == 0 else part for n, part in enumerate(parts))
    if calls := message.get("tool_calls"):
        marked["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": mark_inside(call["function"]["arguments"], "arguments")}}
            for call in calls
        ]
    return marked, leaves


def message_texts(message: Message) -> list[str]:
    """A message's texts: its reasoning, its content between tags of reasoning, names of calls and texts in their arguments."""
    _, leaves = _mark_texts(message, re.compile("(</?think>)"))
    return [*(leaf.text for leaf in leaves), *(call["function"]["name"] for call in message.get("tool_calls") or [])]


_LETTERS, _DIGITS = str.maketrans("0123456789", "abcdefghij"), str.maketrans("abcdefghij", "0123456789")
"""The number of a mark is written in letters, which no template interprets."""


@cache
def _tags(template: str) -> "re.Pattern[str]":
    """The tags in a template's source, some of which it may look for in a text."""
    tags = sorted(set(re.findall(r"</?[A-Za-z_][\w:]*>|\[/?[A-Z_]{2,}\]", template)), key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, tags))})") if tags else re.compile("((?!))")


def ignored_key(messages: list[Message], number: int, trained: bool, render: Callable[[list[Message]], str]) -> str | None:
    """A key of a message that the template ignores in the conversation up to it, if there is one.

    Args:
        trained: The message is trained on, so `check_answer` looks for its reasoning.
    """
    message = messages[number]
    for key, value in message.items():
        handled = key in HANDLED_KEYS or (key == "name" and message["role"] == "tool") or (trained and key in REASONING)
        if handled or value in ("", [], {}):
            continue
        without = {k: v for k, v in message.items() if k != key}
        before = messages[:number]
        try:
            if render([*before, message]) != render([*before, without]):
                continue
        except DataError:
            continue  # the template requires it
        return key
    return None


def explain_ignored(key: str, template: Template) -> str:
    """What to do about a key that the template ignores."""
    if key in REASONING:
        way = "put it into the content, as <think>…</think>, or " if template.keeps_thinking else ""
        return f"the model's chat template does not write {key}: {way}ignore it with data.ignore=[{key}]"
    return f"the key {key} is not used: a message with weight: 0 is not trained on; ignore the key with data.ignore=[{key}]"


HANDLED_KEYS = {"role", "content", "tool_calls", "tool_call_id"}
"""Keys that other checks cover, or that only link messages."""


def _short(text: str) -> str:
    shown = repr(text)
    return shown if len(shown) <= 60 else f"{shown[:60]}…"
