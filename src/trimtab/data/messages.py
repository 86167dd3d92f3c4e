"""Messages, calls of tools and texts in the forms that they come in, as chat templates read them."""

from typing import Any

from trimtab.data.example import Refused
from trimtab.data.strict_json import kind, parse_json

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt", "chatbot", "ai", "bing", "bard"), "assistant"),
    **dict.fromkeys(
        ("tool", "observation", "function", "function_response", "tool_response", "tool_result", "ipython"), "tool"
    ),
    **dict.fromkeys(("function_call", "tool_call"), "function_call"),
}
"""The words for who speaks, in whatever case; a function_call is a call of the assistant's, written as JSON."""


def text_of(value: Any, what: str, *, empty: bool = False) -> str:
    if isinstance(value, list) and value and all(isinstance(p, dict) and p.get("type") == "text" for p in value):
        value = "".join(text_of(part.get("text"), what, empty=True) for part in value)  # OpenAI's content parts
    if not isinstance(value, str):
        raise Refused(f"{what} is {kind(value)}, not a text")
    if not empty and not value.strip():
        raise Refused(f"{what} is empty")
    return value


def read_messages(raw: Any, what: str) -> tuple[list[dict[str, Any]], set[int]]:
    """Messages in the form that chat templates read, and the indices of those not to learn; each with `role` and `content`, or
    `from` and `value`, as ShareGPT has it."""
    if not isinstance(raw, list) or not raw:
        raise Refused(f"{what} is {'an empty list' if raw == [] else kind(raw)}, not a list of messages")
    messages, silent = [], set()
    for number, message in enumerate(raw):
        name = f"{what}[{number}]"
        if not isinstance(message, dict) or not ("role" in message or "from" in message):
            raise Refused(f"{name} is not a message with role and content, or from and value")
        who, says = ("role", "content") if "role" in message else ("from", "value")
        messages.append(_message(message, who, says, name))
        if _is_silent(message, name):
            silent.add(number)
    return messages, silent


def _message(message: dict[str, Any], who: str, says: str, name: str) -> dict[str, Any]:
    role = ROLES.get(message[who].strip().lower()) if isinstance(message[who], str) else None
    if role is None:
        raise Refused(
            f"{name}.{who} is {message[who]!r}, not system, user, assistant or tool, nor another word for one of them"
        )
    content, calls = message.get(says), message.get("tool_calls") or None
    if old := message.get("function_call"):  # OpenAI's, before there were tools
        calls = [{"function": old}]
    if role == "function_call":
        role, calls, content = "assistant", _function_call(text_of(content, f"{name}.{says}"), name), None
    content = "" if calls and content is None else text_of(content, f"{name}.{says}", empty=bool(calls))
    given = ("weight", "tool_calls", "function_call", who, says)
    kept = {key: value for key, value in message.items() if key not in given and value is not None}
    kept = {"role": role, "content": content, **kept}
    return {**kept, "tool_calls": _tool_calls(calls, name)} if calls else kept


def _is_silent(message: dict[str, Any], name: str) -> bool:
    weight = message.get("weight")
    if weight not in (None, 0, 1):
        raise Refused(f"{name}.weight is {weight!r}; it can be 0 (read, not learned) or 1")
    return weight == 0


def _tool_calls(calls: Any, name: str) -> list[dict[str, Any]]:
    """OpenAI writes a call's arguments as a JSON text; templates want the object itself."""
    fixed = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Refused(f"{name}.tool_calls holds a call without function.name")
        what = f"the arguments of {function['name']}"
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = _parsed(arguments or "{}", f"{name}.tool_calls: {what}")
        if not isinstance(arguments, dict | None):
            raise Refused(f"{name}.tool_calls: {what} are {kind(arguments)}, not an object")
        fixed.append({**call, "type": "function", "function": {**function, "arguments": arguments or {}}})
    return fixed


def _parsed(text: str, what: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise Refused(f"{what}: not valid JSON: {error}") from None


def read_tools(raw: Any) -> tuple[Any, ...]:
    if isinstance(raw, str):
        raw = _parsed(raw, "tools") if raw.strip() else []
    if raw is not None and not isinstance(raw, list):
        raise Refused(f"tools is {kind(raw)}, not a list of tool descriptions")
    return tuple(raw or ())


def _function_call(value: str, name: str) -> list[dict[str, Any]]:
    calls = _parsed(value, f"{name}: the function_call")
    calls = calls if isinstance(calls, list) else [calls]
    return [{"type": "function", "function": call} for call in calls]
