"""Messages as vendors' interfaces and libraries export them, turned into chat messages with role, content and tool_calls.

| from | what is turned |
|---|---|
| Anthropic's Messages | content parts `tool_use`, `tool_result`, `thinking` |
| OpenAI's Responses | items `message`, `reasoning`, `function_call`, `function_call_output`: the assistant's are one message |
| Gemini's contents | role and `parts`: text, functionCall, functionResponse |
| Bedrock's Converse | content parts with `text`, `toolUse`, `toolResult` |
| LangChain | `type` human, ai, tool, …, with `data` or `kwargs` around it or without; `additional_kwargs` |
"""

import json
from typing import Any

from trimtab.data.example import InvalidExample

Placed = tuple[str, Any]
"""The place of a message, and the message."""

LANGCHAIN = {"human", "ai", "system", "tool", "function", "chat", "developer"}
"""LangChain's types of messages."""
ITEMS = ("reasoning", "message", "function_call", "function_call_output")
"""Items of OpenAI's Responses interface; the first three are the assistant's, in the order in which a turn has them."""
ABOUT_RESPONSE = {
    "id", "type", "status", "model", "stop_reason", "stop_sequence", "usage", "response_metadata", "usage_metadata", "example",
    "invalid_tool_calls", "additional_kwargs", "artifact", "tool_call_chunks", "chunk_position",
}  # fmt: skip
"""Keys of exported messages that tell about the response, and nothing that was said."""
TRAINED_BY = ("weight", "train", "loss")
CALL, RESULT = "tool_use", "tool_result"
"""Anthropic's types of content parts, of which the others' are variants."""


def are_messages_with_parts(value: Any) -> bool:
    """Whether a column `contents` is Gemini's, and not any list of texts or documents."""
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) and "parts" in one for one in value)


def chat_messages(raw: list[Any], column: str) -> list[Placed]:
    """Each as a chat message, with its place; what is in no known form stays as it is. Raises InvalidExample."""
    places = [f"{column}[{number}]" for number in range(len(raw))]
    placed = [(place, _unwrapped(message, place)) for place, message in zip(places, raw, strict=True)]
    if any(_item(message) for _, message in placed):
        placed = _joined(placed)
    return [one for place, message in placed for one in _apart(place, message)]


def _unwrapped(message: Any, place: str) -> Any:
    """LangChain's and Gemini's messages with role and content, and those of responses without what tells about these."""
    if not isinstance(message, dict):
        return message
    if message.get("lc") and isinstance(message.get("kwargs"), dict):
        (*_, name) = message.get("id") or [""]
        message = {"type": str(name).removesuffix("Chunk").removesuffix("Message").lower(), **message["kwargs"]}
    elif message.get("type") in LANGCHAIN and isinstance(message.get("data"), dict):
        message = {"type": message["type"], **message["data"]}
    if "from" in message:
        return message
    kind = str(message.get("type")).removesuffix("MessageChunk").lower()
    if kind in LANGCHAIN and "content" in message:
        return _of_langchain(message, kind, place)
    if "parts" in message and "content" not in message:
        return {"role": message.get("role") or "user", "content": message["parts"], **_others(message, {"role", "parts"})}
    return _others(message, ABOUT_RESPONSE) if message.get("type") == "message" and "role" in message else message


def _others(message: dict[str, Any], keys: set[str]) -> dict[str, Any]:
    return {key: value for key, value in message.items() if key not in keys}


def _of_langchain(message: dict[str, Any], kind: str, place: str) -> dict[str, Any]:
    if message.get("invalid_tool_calls"):
        raise InvalidExample(
            f"{place} has invalid_tool_calls, whose arguments are no JSON object: leave the example out (data.bad_rows=skip)"
        )
    more = message.get("additional_kwargs") or {}
    said = {key: more[key] for key in ("tool_calls", "function_call", "reasoning_content") if more.get(key)}
    told = {key: value for key, value in message.items() if key not in ABOUT_RESPONSE and value not in (None, [])}
    failed = {"is_error": True} if message.get("status") == "error" else {}
    return {"role": kind, "content": message["content"], **said, **told, **failed}


# Items of responses


def _item(message: Any) -> str | None:
    """The type of an item of a response, if it is one that is no message."""
    known = isinstance(message, dict) and message.get("type") in ITEMS and "role" not in message and "from" not in message
    return message["type"] if known else None


def _joined(placed: list[Placed]) -> list[Placed]:
    """A response's items as messages: reasoning, text and calls of one turn are one message."""
    joined: list[Placed] = []
    stage = len(ITEMS)  # how far the last message has come, if it can still go on
    for place, message in placed:
        kind = _item(message)
        if kind == "function_call_output":
            result = {"role": "tool", "content": message.get("output"), "tool_call_id": message.get("call_id")}
            joined.append((place, result | _trained_by(message)))
            stage = len(ITEMS)
            continue
        if kind is None and not (isinstance(message, dict) and message.get("role") == "assistant"):
            joined.append((place, message))
            stage = len(ITEMS)
            continue
        piece = _piece(message, kind, place)
        if not piece:
            continue  # reasoning that the vendor keeps to itself
        at = ITEMS.index(kind or "message")
        if at < stage or (at == stage and kind is None):
            joined.append((place, {"role": "assistant", "content": None} | piece))
        else:
            joined[-1] = (joined[-1][0], _with(joined[-1][1], piece, place))
        stage = at
    return joined


def _piece(message: dict[str, Any], kind: str | None, place: str) -> dict[str, Any]:
    """What an item adds to the assistant's message."""
    if kind is None:
        return message
    if kind == "function_call":
        call = {"id": message.get("call_id"), "name": message.get("name"), "arguments": message.get("arguments")}
        return {"tool_calls": [call], **_trained_by(message)}
    parts = message.get("content") or message.get("summary") or []
    texts = [str(part["text"]) for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)]
    if len(texts) < len(parts):
        raise InvalidExample(f"{place}: its reasoning is not a list of parts with a text")
    return {"reasoning_content": "\n\n".join(texts), **_trained_by(message)} if any(texts) else {}


def _with(message: dict[str, Any], piece: dict[str, Any], place: str) -> dict[str, Any]:
    """The message with a later piece of the same turn."""
    for key in TRAINED_BY:
        if message.get(key) != piece.get(key):
            raise InvalidExample(
                f"{place} is part of the assistant's turn before it, and they differ in {key}: give it to all of them"
            )
    calls = [*message.get("tool_calls", []), *piece.get("tool_calls", [])]
    reasoning = [one["reasoning_content"] for one in (message, piece) if one.get("reasoning_content")]
    joined = {**message, **{key: value for key, value in piece.items() if value is not None}}
    joined |= {"tool_calls": calls} if calls else {}
    return joined | ({"reasoning_content": "\n\n".join(reasoning)} if reasoning else {})


def _trained_by(message: dict[str, Any]) -> dict[str, Any]:
    return {key: message[key] for key in TRAINED_BY if key in message}


# Content parts


def system_parts(system: Any) -> Any:
    """A system message as a text or content parts: Gemini's has its parts in an object, Bedrock's parts have no type."""
    parts = system.get("parts") if isinstance(system, dict) else system
    return [_typed(part) for part in parts] if isinstance(parts, list) else parts


def _apart(place: str, message: Any) -> list[Placed]:
    """A message whose content has calls or results among its parts, with these where chat messages have them."""
    content = message.get("content") if isinstance(message, dict) and "from" not in message else None
    if not isinstance(content, list):
        return [(place, message)]
    parts = [_typed(part) for part in content]
    kinds = [part.get("type") if isinstance(part, dict) else None for part in parts]
    answers = str(message.get("role")).strip().lower() in ("assistant", "model", "ai")
    wrong = RESULT if answers else CALL
    if wrong in kinds:
        whose = "a result in a message of the assistant's" if answers else "a call in a message that is not the assistant's"
        raise InvalidExample(
            f"{place}.content has a part of type {wrong}, {whose}: roles are exchanged, or the part is misplaced"
        )
    message = {**message, "content": parts}
    if answers:
        return [(place, _with_calls(message, parts, place))] if CALL in kinds else [(place, message)]
    return _results_apart(place, message) if RESULT in kinds else [(place, message)]


def _with_calls(message: dict[str, Any], parts: list[Any], place: str) -> dict[str, Any]:
    first = next(n for n, part in enumerate(parts) if _is(part, CALL))
    if any(_is(part, "text") and str(part.get("text")).strip() for part in parts[first:]):
        raise InvalidExample(
            f"{place}.content has a text behind a tool call, where chat templates have none: put the text before the call, or into a message of "
            "its own"
        )
    calls = [
        {"id": part.get("id"), "name": part.get("name"), "arguments": part.get("input")} for part in parts if _is(part, CALL)
    ]
    rest = [part for part in parts if not _is(part, CALL)]
    given = message.get("tool_calls") or []  # LangChain has Anthropic's calls twice
    if given and len(given) != len(calls):
        raise InvalidExample(f"{place} has tool_calls, and others as parts of its content: remove one of them")
    return {**message, "content": rest or None, "tool_calls": given or calls}


def _results_apart(place: str, message: dict[str, Any]) -> list[Placed]:
    """A user's message as tool messages, and what else it says as messages of its own, in their order."""
    apart: list[Placed] = []
    for part in message["content"]:
        if _is(part, RESULT):
            content = part.get("content")
            content = [_typed(inner) for inner in content] if isinstance(content, list) else content
            result = {
                "role": "tool",
                "content": content or "",
                "tool_call_id": part.get("tool_use_id"),
                "name": part.get("name"),
            }
            failed = {"is_error": True} if part.get("is_error") else {}  # which a template writes, or the example is refused
            apart.append((f"{place}: its {RESULT}", result | failed | _trained_by(message)))
        elif apart and apart[-1][0] == place:
            apart[-1][1]["content"].append(part)
        elif not _is(part, "text") or str(part.get("text")).strip():
            if str(message["role"]).lower() not in ("user", "human"):
                raise InvalidExample(f"{place}.content has a {RESULT} and what is none, and only a user's message has both")
            apart.append((place, {**message, "content": [part]}))
    return apart


def _is(part: Any, kind: str) -> bool:
    return isinstance(part, dict) and part.get("type") == kind


def _typed(part: Any) -> Any:
    """A content part in Anthropic's form, if it is a text, reasoning, a call or a result in another's."""
    if not isinstance(part, dict):
        return part
    if part.get("type") == "tool_call":
        return {"type": CALL, "id": part.get("id"), "name": part.get("name"), "input": part.get("args")}
    if part.get("type") == "refusal":
        return {"type": "text", "text": part.get("refusal")}
    if part.get("type") is not None:
        return part
    part = {key: value for key, value in part.items() if value is not None}  # tables have every part's keys in all of them
    if "text" in part:
        return {"type": "thinking" if part.get("thought") else "text", "text": part["text"]}
    if "json" in part:
        return {"type": "text", "text": json.dumps(part["json"], ensure_ascii=False)}
    for names, read in _UNTYPED.items():
        if value := next((part[name] for name in names if isinstance(part.get(name), dict)), None):
            return read(value)
    return {**part, "type": next(iter(part), "nothing")}


_UNTYPED = {
    ("functionCall", "function_call"): lambda v: {"type": CALL, "id": v.get("id"), "name": v.get("name"), "input": v.get("args")},
    ("functionResponse", "function_response"): lambda v: {
        "type": RESULT, "tool_use_id": v.get("id"), "name": v.get("name"), "content": json.dumps(v.get("response"), ensure_ascii=False),
    },
    ("toolUse",): lambda v: {"type": CALL, "id": v.get("toolUseId"), "name": v.get("name"), "input": v.get("input")},
    ("toolResult",): lambda v: {
        "type": RESULT, "tool_use_id": v.get("toolUseId"), "content": v.get("content"), "is_error": v.get("status") == "error",
    },
    ("reasoningContent",): lambda v: {"type": "thinking", "text": (v.get("reasoningText") or {}).get("text")},
}  # fmt: skip
"""Names of parts without a type -> Anthropic's form of them: Gemini's and Bedrock's."""
