"""Messages and texts in the forms that data has them, turned into the form that chat templates read."""

import math
import re
from typing import Any

from trimtab.core.chat import Message
from trimtab.data.example import InvalidExample
from trimtab.data.exported_messages import chat_messages
from trimtab.data.strict_json import kind
from trimtab.data.tool_calls import parsed, read_calls

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt", "chatbot", "ai", "bing", "bard"), "assistant"),
    **dict.fromkeys(
        ("tool", "observation", "function", "function_response", "tool_response", "tool_result", "ipython"), "tool"
    ),
    **dict.fromkeys(("function_call", "tool_call"), "function_call"),
}
"""Names of roles in any case -> the role; a function_call is a tool call of the assistant's, written as JSON."""


TEXT_PARTS = {"text", "input_text", "output_text"}
"""Types of content parts that are texts."""
REASONING_PARTS = ("thinking", "reasoning")
"""Types of content parts that are an answer's reasoning: Anthropic's and Mistral's, LangChain's."""
MEDIA = {"image", "images", "audio", "audios", "video", "videos"}
"""Columns, and keys of messages, that hold what is no text."""
_MEDIA_PART = re.compile(r"image|audio|video|file|pdf|document")
TEXT_ALONE = "and Trimtab trains on texts alone"

SWITCHES = ("train", "loss")
"""Keys by which other tools say whether a message is trained on: Axolotl's and ms-swift's."""
MOST = 1e6
"""The largest weight of a message; the smallest above 0 is its inverse."""


def text_of(value: Any, name: str, *, empty: bool = False) -> str:
    """A text, or OpenAI's content parts joined. Raises InvalidExample for anything else, and unless allowed for an empty text."""
    if isinstance(value, list) and value and all(isinstance(part, dict) and "type" in part for part in value):
        for part in value:
            if part["type"] not in TEXT_PARTS:
                why = f", {TEXT_ALONE}" if _MEDIA_PART.search(str(part["type"])) else ", which is no text"
                raise InvalidExample(
                    f"{name} has a part of type {part['type']}{why}: leave the example out (data.bad_rows=skip), or remove the part"
                )
        value = "".join(text_of(part.get("text"), name, empty=True) for part in value)
    if not isinstance(value, str):
        raise InvalidExample(f"{name} is {kind(value)}, not a text")
    if not empty and not value.strip():
        raise InvalidExample(f"{name} is empty")
    return value


def read_messages(raw: Any, column: str) -> tuple[list[Message], dict[int, float]]:
    """Messages as chat templates read them, and the weights in the loss that some have of their own, by index.

    Each has `role` and `content` in the data, or `from` and `value`, as ShareGPT has it, or a form of `data.exported_messages`.
    """
    if not isinstance(raw, list) or not raw:
        raise InvalidExample(f"{column} is {'an empty list' if raw == [] else kind(raw)}, not a list of messages")
    messages, weights = [], {}
    for number, (name, message) in enumerate(chat_messages(raw, column)):
        if not isinstance(message, dict) or not ("role" in message or "from" in message):
            if isinstance(message, dict) and isinstance(message.get("type"), str):
                raise InvalidExample(
                    f"{name} is of type {message['type']}, which chat templates have no place for: leave the example out (data.bad_rows=skip), "
                    "or remove it"
                )
            raise InvalidExample(f"{name} is not a message with role and content, or from and value")
        messages.append(_message(message, name))
        if (weight := _weight(message, name)) is not None:
            weights[number] = weight
    return messages, weights


def _weight(message: dict[str, Any], name: str) -> float | None:
    """The weight that a message has of its own, as a number, or as true or false in the words of other tools."""
    weight = message.get("weight")
    if weight is not None and (not isinstance(weight, int | float) or not _is_weight(weight)):
        raise InvalidExample(
            f"{name}.weight is {weight!r}; it can be 0 (in the context, not trained on), 1, or another number from {1 / MOST:f} to {MOST:,.0f}"
        )
    for key in SWITCHES:
        if (trained := message.get(key)) is None:
            continue
        if not isinstance(trained, bool):
            raise InvalidExample(f"{name}.{key} is {trained!r}, not true or false; a weight in the loss is written as weight")
        if weight is not None and bool(weight) != trained:
            raise InvalidExample(f"{name}: {key}={str(trained).lower()} contradicts what else says whether it is trained on")
        weight = float(trained) if weight is None else weight
    return None if weight is None else float(weight)


def _is_weight(weight: float) -> bool:
    return weight == 0 or (math.isfinite(weight) and 1 / MOST <= weight <= MOST)


def _message(raw: dict[str, Any], name: str) -> Message:
    role_key, content_key = ("role", "content") if "role" in raw else ("from", "value")
    role = ROLES.get(raw[role_key].strip().lower()) if isinstance(raw[role_key], str) else None
    if role is None:
        raise InvalidExample(
            f"{name}.{role_key} is {raw[role_key]!r}, not system, user, assistant or tool, nor a known synonym of one of them"
        )
    if media := next((key for key in sorted(MEDIA & raw.keys()) if raw[key]), None):
        raise InvalidExample(
            f"{name} has {media}, {TEXT_ALONE}: leave the example out (data.bad_rows=skip), or ignore the key (data.ignore=[{media}])"
        )
    content, calls = raw.get(content_key), raw.get("tool_calls") or None
    if call := raw.get("function_call"):  # OpenAI's, before there were tools
        calls = [{"function": call}]
    if role == "function_call":
        calls = parsed(text_of(content, f"{name}.{content_key}"), f"{name}: the function_call")
        calls = [{"type": "function", "function": call} for call in (calls if isinstance(calls, list) else [calls])]
        role, content = "assistant", None
    reasoning = ""
    if role == "assistant" and isinstance(content, list):
        content, reasoning = _without_reasoning(content, f"{name}.{content_key}")
        content = content or (None if calls else "")
    content = (
        "" if calls and content is None else text_of(content, f"{name}.{content_key}", empty=bool(calls) or role == "tool")
    )
    read = ("weight", *SWITCHES, "tool_calls", "function_call", role_key, content_key)
    message = {key: value for key, value in raw.items() if key not in read and value is not None}
    message = {"role": role, "content": content, **message}
    if reasoning:
        if said := next((key for key in ("reasoning_content", *REASONING_PARTS) if message.get(key)), None):
            raise InvalidExample(f"{name} has its reasoning twice, in {said} and as a part of {content_key}: remove one")
        message["reasoning_content"] = reasoning
    return {**message, "tool_calls": read_calls(calls, name)} if calls else message


def _without_reasoning(parts: list[Any], name: str) -> tuple[list[Any], str]:
    """Content parts but for those that are reasoning, and the text of these."""
    kinds = [part.get("type") if isinstance(part, dict) else None for part in parts]
    texts = [
        text_of(part.get(kind) or part.get("text"), f"{name}: its {kind}")
        for part, kind in zip(parts, kinds, strict=True)
        if kind in REASONING_PARTS
    ]
    return [part for part, kind in zip(parts, kinds, strict=True) if kind not in REASONING_PARTS], "".join(texts)


def read_switches(raw: Any) -> dict[str, Any]:
    """The switches of the chat template that an example sets, without those that are null."""
    if isinstance(raw, str):
        raw = parsed(raw, "chat_template_kwargs") if raw.strip() else {}
    if raw is not None and not isinstance(raw, dict):
        raise InvalidExample(f'chat_template_kwargs is {kind(raw)}, not an object such as {{"enable_thinking": false}}')
    return {name: value for name, value in (raw or {}).items() if value is not None}
