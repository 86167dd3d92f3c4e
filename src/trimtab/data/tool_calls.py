"""Tools, calls of them and their results in the forms that data has them, turned into the form that chat templates read."""

from typing import Any

from trimtab.core.chat import Message
from trimtab.data.example import InvalidExample
from trimtab.data.strict_json import kind, parse_json

ARGUMENTS = ("arguments", "args", "input", "parameters")
"""What the arguments of a call are called: OpenAI's, LangChain's, Anthropic's, Llama's."""
SCHEMAS = ("parameters", "input_schema", "parametersJsonSchema", "parameters_json_schema")
"""What the schema of a tool's arguments is called: OpenAI's, Anthropic's, Gemini's."""


def read_calls(calls: Any, name: str) -> list[dict[str, Any]]:
    """Calls whose arguments are objects, as most templates want them; OpenAI writes them as JSON texts."""
    read = []
    for call in calls if isinstance(calls, list) else [calls]:
        if isinstance(call, dict) and call.get("type") == "custom":
            raise InvalidExample(
                f"{name}.tool_calls holds a call of a custom tool, whose input is no object: leave the example out"
            )
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InvalidExample(f"{name}.tool_calls holds a call without function.name")
        place = f"{name}.tool_calls: the arguments of {function['name']}"
        arguments = next((function[key] for key in ARGUMENTS if function.get(key) is not None), None)
        if isinstance(arguments, str):
            arguments = parsed(arguments or "{}", place)
        if not isinstance(arguments, dict | None):
            raise InvalidExample(f"{place} are {kind(arguments)}, not an object")
        whole = {} if function is call else {key: value for key, value in call.items() if key not in ("function", "id")}
        id = {"id": call["id"]} if call.get("id") is not None else {}
        more = {key: value for key, value in function.items() if key not in (*ARGUMENTS, "name", "id", "type")}
        made = {"name": function["name"], "arguments": arguments or {}, **(more if function is not call else {})}
        read.append({**whole, **id, "type": "function", "function": made})
    return read


def with_results_linked(messages: list[Message]) -> list[Message]:
    """The messages with an id for each call that has none, and with the id and the name of its call for each result that lacks them.

    A result without an id is that of the first call of its name that has none yet. Mistral's templates want ids of nine letters.
    """
    waiting: list[tuple[str, str]] = []
    linked, given = [], 0
    for message in messages:
        if calls := message.get("tool_calls"):
            for call in calls:
                given += 1
                call.setdefault("id", f"call{given:05}")
            waiting = [(call["id"], call["function"]["name"]) for call in calls]
        elif message["role"] == "tool":
            id, name = message.get("tool_call_id"), message.get("name")
            found = next((one for one in waiting if (one[0] == id if id is not None else name in (None, one[1]))), None)
            if found:
                waiting.remove(found)
                message = {**message, "tool_call_id": found[0], "name": name or found[1]}
        linked.append(message)
    return linked


def read_tools(raw: Any) -> tuple[Any, ...]:
    """Descriptions of tools, as OpenAI's chat interface and so chat templates have them."""
    if isinstance(raw, str):
        raw = parsed(raw, "tools") if raw.strip() else []
    if raw is not None and not isinstance(raw, list):
        raise InvalidExample(f"tools is {kind(raw)}, not a list of tool descriptions")
    return tuple(tool for one in raw or () for tool in _described(one))


def _described(tool: Any) -> list[Any]:
    """A tool of another interface's as a function; others as they are, which some templates know by their type alone."""
    if not isinstance(tool, dict):
        return [tool]
    declared = tool.get("functionDeclarations") or tool.get("function_declarations")
    if isinstance(declared, list):
        return [made for one in declared for made in _described(_with_lower_types(one))]
    if isinstance(spec := tool.get("toolSpec"), dict):
        tool = {**spec, "input_schema": (spec.get("inputSchema") or {}).get("json")}
    schema = next((tool[key] for key in SCHEMAS if tool.get(key) is not None), None)
    of_function = tool.get("type") in (None, "function", "custom") and "function" not in tool
    if not of_function or not isinstance(tool.get("name"), str) or not isinstance(schema, dict):
        return [tool]
    said = {key: tool[key] for key in ("name", "description") if tool.get(key) is not None}
    more = {key: tool[key] for key in ("strict", "response", "return") if tool.get(key) is not None}
    return [{"type": "function", "function": {**said, "parameters": schema, **more}}]


def _with_lower_types(value: Any) -> Any:
    """A schema whose types are written as JSON schemas have them: Gemini's are in capitals."""
    if isinstance(value, dict):
        return {
            key: inner.lower() if key == "type" and isinstance(inner, str) else _with_lower_types(inner)
            for key, inner in value.items()
        }
    return [_with_lower_types(inner) for inner in value] if isinstance(value, list) else value


def parsed(text: str, name: str) -> Any:
    """The value of a JSON text. Raises InvalidExample."""
    try:
        return parse_json(text)
    except ValueError as error:
        raise InvalidExample(f"{name}: not valid JSON: {error}") from None
