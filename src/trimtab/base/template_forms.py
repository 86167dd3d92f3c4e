"""The forms in which chat templates read messages: which one a template needs is found by probing it."""

import hashlib
import json
import re
from datetime import datetime
from functools import lru_cache
from typing import NamedTuple

from trimtab.core.chat import Message


class Form(NamedTuple):
    """How messages are given to a template."""

    parts: bool = False
    """Contents as lists of parts (LLaVA's, Idefics')."""
    json_arguments: bool = False
    """Arguments of calls as JSON text (DeepSeek's)."""
    short_ids: bool = False
    """Ids of calls as nine letters or digits (Mistral's): others, as other interfaces make them, are replaced by nine of their digest."""


def in_form(message: Message, form: Form) -> Message:
    """The message in this form."""
    if reasoning := message.get("reasoning_content") or message.get("thinking"):
        message = {"reasoning": reasoning, **message}  # Transformers adds the other names
    if form.parts:
        message = {**message, "content": [{"type": "text", "text": message["content"]}]}
    if form.json_arguments and message.get("tool_calls"):
        message = {**message, "tool_calls": [_with_json_arguments(call) for call in message["tool_calls"]]}
    if form.short_ids:
        message = _with_short_ids(message)
    return message


def _with_json_arguments(call: Message) -> Message:
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def _with_short_ids(message: Message) -> Message:
    if message.get("tool_call_id"):
        message = {**message, "tool_call_id": _short(message["tool_call_id"])}
    if message.get("tool_calls"):
        calls = [{**call, "id": _short(call["id"])} if call.get("id") else call for call in message["tool_calls"]]
        message = {**message, "tool_calls": calls}
    return message


def _short(id: object) -> str:
    text = str(id)
    return text if re.fullmatch("[a-zA-Z0-9]{9}", text) else hashlib.sha256(text.encode()).hexdigest()[:9]


@lru_cache(maxsize=8)
def with_fixed_date(template: str, moment: datetime) -> str:
    """The template with `strftime_now` fixed at this moment."""
    if "strftime_now" not in template:
        return template
    forms = {text: moment.strftime(text) for text in re.findall(r"""["']([^"']*%[^"']*)["']""", template)}
    return (
        "{%- macro strftime_now(form) -%}{%- set texts = " + json.dumps(forms) + " -%}"
        "{{- texts[form] if form in texts else raise_exception('the form ' ~ form ~ ' of the date is not a literal in the template') -}}"
        "{%- endmacro -%}" + template
    )
