"""That what is trained on says what the message says: each of its texts stands in it, and all else is what the template writes around any text.

The message is rendered once more with marks in place of its texts. What the template writes between the marks must be what
it wrote between the texts, and a mark that is missing is a text that it leaves out.
"""

import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple, Protocol

from trimtab.core.errors import DataError
from trimtab.data.example import Refused

Message = dict[str, Any]

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys under which a message's reasoning comes; Transformers hands any of them on under the name that the template reads."""
OPENS, CLOSES = "<think>", "</think>"
_THINKING = re.compile(r"\s*(<think>)?(.*?)</think>(.*)", re.DOTALL)
_MARK = re.compile(r"qxmark([a-z]+?)xq")
MOST_FRAMES = 1000


class Leaf(NamedTuple):
    """A text of a message."""

    text: str
    what: str


class Writing(Protocol):
    """What a base's template offers here. See `base.template.ChatTemplate`."""

    source: Any
    frames: set[tuple[str, ...]]

    @property
    def keeps_thinking(self) -> bool: ...


def parted(message: Message, *, opened: bool) -> tuple[str, Message]:
    """Its reasoning, from a key of its own or from the beginning of the content; and the message without.

    Args:
        opened: The prompt has begun the reasoning, so that a content need not.
    """
    own = next((message[key] for key in REASONING if isinstance(message.get(key), str)), None)
    rest = {key: value for key, value in message.items() if key not in REASONING}
    if own is not None:
        return own, rest
    found = _THINKING.fullmatch(message["content"])
    if found is None or not (found[1] or opened) or OPENS in found[2] or CLOSES in found[3]:
        return "", rest
    return found[2].strip("\n"), {**rest, "content": found[3].lstrip("\n")}


def check_said(message: Message, said: str, say: Callable[[Message], str], template: Writing) -> None:
    """Refuse a turn of the assistant's that is trained on as something else than it says.

    Args:
        said: What is trained on, from the end of the prompt on.
        say: The same for another message in its place.

    Raises:
        Refused: A text of it is left out, or is written otherwise than others would be.
    """
    marked, leaves = _marked(message, _tags(str(template.source)))
    if _between(said, leaves) in template.frames:
        return
    try:
        probe = say(marked)
    except DataError as error:
        raise Refused(f"the chat template writes this message and not another in its place: {error}") from None
    order = [int(found, 26) for found in map(_numeral, _MARK.findall(probe))]
    if missing := [leaf for number, leaf in enumerate(leaves) if number not in order]:
        what, text = missing[0].what, _short(missing[0].text)
        raise Refused(
            about(what, template) if what in REASONING else f"the model's chat template leaves out its {what}: {text}"
        )
    if len(set(order)) < len(order):
        twice = next(leaf for number, leaf in enumerate(leaves) if order.count(number) > 1)
        raise Refused(f"the model's chat template writes its {twice.what} more than once: {_short(twice.text)}")
    frame = tuple(_MARK.split(probe)[::2])
    _compare(said, frame, [leaves[number] for number in order])
    calls = message.get("tool_calls") or []
    for call in calls:
        _check_call(call["function"], said)
    if not calls and len(template.frames) < MOST_FRAMES:
        template.frames.add(frame)


def _between(said: str, leaves: list[Leaf]) -> tuple[str, ...]:
    """What stands between its texts, one found after the other; nothing if one is not found."""
    found, at = list[str](), 0
    for leaf in leaves:
        start = said.find(leaf.text, at)
        if start < 0:
            return ()
        found.append(said[at:start])
        at = start + len(leaf.text)
    return (*found, said[at:])


def _compare(said: str, frame: tuple[str, ...], leaves: list[Leaf]) -> None:
    if not said.startswith(frame[0]):
        raise Refused(f"the model's chat template begins this turn as {_short(said)}, and others as {_short(frame[0])}")
    at = len(frame[0])
    for leaf, then in zip(leaves, frame[1:], strict=True):
        ends = (at + len(text) for text in forms(leaf.text) if said.startswith(text, at))
        end = next((end for end in ends if said.startswith(then, end)), None)
        if end is None:
            end = said.find(then, at) if then else len(said)
            if end < 0 or plain(leaf.text) != plain(said[at:end]):
                raise Refused(
                    f"the model's chat template does not write its {leaf.what} as it stands: {_short(leaf.text)} "
                    f"becomes {_short(said[at:])}"
                )
        at = end + len(then)
    if at != len(said):
        raise Refused(f"the model's chat template ends this turn as {_short(said[at:])}, and others do not")


def forms(text: str) -> Iterator[str]:
    """A text as templates write it: as it is, in JSON, Python or XML."""
    yield text
    yield json.dumps(text, ensure_ascii=False)[1:-1]
    yield json.dumps(text)[1:-1]
    yield repr(text)[1:-1]
    yield f"<![CDATA[{text}]]>"


def plain(text: str) -> str:
    """Without what is left of it in another notation."""
    return re.sub(r"[\s\\]+", "", text)


def _check_call(function: dict[str, Any], said: str) -> None:
    """Names and numbers of a call, which no mark can stand for."""
    for name in (function["name"], *_names(function["arguments"])):
        if name not in said:
            raise Refused(f"the model's chat template leaves out {_short(name)} of the call of {function['name']}")


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


def _marked(message: Message, tags: "re.Pattern[str]") -> tuple[Message, list[Leaf]]:
    """The message with marks in place of its texts, and these texts in the order of their marks."""
    leaves: list[Leaf] = []

    def mark(text: str, what: str) -> str:
        core = text.strip()
        if not core:
            return text
        leaves.append(Leaf(core, what))
        start = text.index(core)
        return f"{text[:start]}qxmark{_letters(len(leaves) - 1)}xq{text[start + len(core) :]}"

    def inside(value: Any, what: str) -> Any:
        if isinstance(value, str):
            return mark(value, what)
        if isinstance(value, dict):
            return {key: inside(inner, f"argument {key}") for key, inner in value.items()}
        return [inside(inner, what) for inner in value] if isinstance(value, list) else value

    marked = dict(message)
    for key in REASONING:
        if isinstance(message.get(key), str):
            marked[key] = mark(message[key], key)
    # What the template might look for in a text stays: `</think>`, say.
    parts = tags.split(message["content"])
    marked["content"] = "".join(mark(part, "content") if n % 2 == 0 else part for n, part in enumerate(parts))
    if calls := message.get("tool_calls"):
        marked["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": inside(call["function"]["arguments"], "arguments")}}
            for call in calls
        ]
    return marked, leaves


def texts_of(message: Message) -> list[str]:
    """Its texts: reasoning, what stands in its content between tags of reasoning, names of calls and texts in their arguments."""
    _, leaves = _marked(message, re.compile("(</?think>)"))
    return [*(leaf.text for leaf in leaves), *(call["function"]["name"] for call in message.get("tool_calls") or [])]


def _letters(number: int) -> str:
    """A number as letters, which no template takes for anything."""
    high, low = divmod(number, 26)
    return (_letters(high) if high else "") + "abcdefghijklmnopqrstuvwxyz"[low]


def _numeral(letters: str) -> str:
    """The same number in Python's digits of base 26."""
    return letters.translate(_DIGITS)


_DIGITS = str.maketrans("abcdefghijklmnopqrstuvwxyz", "0123456789abcdefghijklmnop")


@cache
def _tags(template: str) -> "re.Pattern[str]":
    """The tags that stand in the template, of which it may look for some in a text."""
    found = sorted(set(re.findall(r"</?[A-Za-z_][\w:]*>|\[/?[A-Z_]{2,}\]", template)), key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, found))})") if found else re.compile("((?!))")


def unread_key(messages: list[Message], number: int, trained: bool, render: Callable[[list[Message]], str]) -> str | None:
    """A key of a message that changes nothing in what the template writes of the conversation up to it, if there is one.

    Args:
        trained: It is trained on, so that `check_said` looks for its reasoning.
    """
    message = messages[number]
    for key, value in message.items():
        known = key in KNOWN or (key == "name" and message["role"] == "tool") or (trained and key in REASONING)
        if known or value in ("", [], {}):
            continue
        without = {k: v for k, v in message.items() if k != key}
        before = messages[:number]
        try:
            if render([*before, message]) != render([*before, without]):
                continue
        except DataError:
            continue  # the template asks for it
        return key
    return None


def about(key: str, template: Writing) -> str:
    """What to do about a key that nothing reads."""
    if key in REASONING:
        way = "put it into the content, as <think>…</think>, or " if template.keeps_thinking else ""
        return f"the model's chat template does not write {key}: {way}leave it out with data.ignore=[{key}]"
    return f"nothing reads {key}: weight: 0 is for a message that is not to be trained on; leave the key out with data.ignore=[{key}]"


KNOWN = {"role", "content", "tool_calls", "tool_call_id"}
"""Keys that are looked after elsewhere, or that only tie messages together."""


def _short(text: str) -> str:
    shown = repr(text)
    return shown if len(shown) <= 60 else f"{shown[:60]}…"
