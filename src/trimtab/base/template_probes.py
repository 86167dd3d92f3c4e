"""Conversations with which a chat template is probed."""

from trimtab.core.chat import Message

CALL_ID = "abcdefghi"
"""Mistral's templates want nine letters."""
LONG_ID = "call_abcdefghijklmnop"
"""An id as OpenAI makes them."""
PROBE = "Zanzibar"
"""A word that no template writes by itself."""

TOOLS = [{
    "type": "function",
    "function": {
        "name": "tool", "description": "A tool.",
        "parameters": {"type": "object", "properties": {"x": {"type": "string", "description": "x"}}, "required": ["x"]},
    },
}]  # fmt: skip


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def answer(content: str) -> Message:
    return {"role": "assistant", "content": content}


def call(argument: str, id: str = CALL_ID) -> Message:
    function = {"name": "tool", "arguments": {"x": argument}}
    return {**answer(""), "tool_calls": [{"type": "function", "id": id, "function": function}]}


def result(id: str) -> Message:
    return {"role": "tool", "name": "tool", "tool_call_id": id, "content": "0"}
