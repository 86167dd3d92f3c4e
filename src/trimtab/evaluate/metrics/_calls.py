"""Tool calls in an answer, in the notations of today's chat templates: JSON, XML, Python, and Gemma's own."""

import ast
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

from trimtab.data.strict_json import parse_json, value_at


class Call(NamedTuple):
    """A call of a tool."""

    name: str
    arguments: dict[str, Any]
    as_texts: bool = False
    """The notation does not tell the text "2" from the number."""

    def equals(self, expected: "Call") -> bool:
        if self.name != expected.name or self.arguments.keys() != expected.arguments.keys():
            return False
        return all(self._is(value, expected.arguments[key]) for key, value in self.arguments.items())

    def _is(self, value: Any, expected: Any) -> bool:
        if self.as_texts and not isinstance(expected, str):
            with suppress(ValueError):
                value = parse_json(value)
        return json.dumps(value, sort_keys=True) == json.dumps(expected, sort_keys=True)  # true is not 1


def find_calls(text: str) -> list[Call]:
    """The calls in a text, in the first notation of which it has any."""
    for notation in (_in_xml, _in_gemmas, _in_python, _in_json):
        with suppress(ValueError, SyntaxError, RecursionError):
            if calls := list(notation(text)):
                return calls
    return []


_XML = (
    (r"<function=([^>\s]+)>(.*?)</function>", r"<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>"),
    (r"<tool_call>([^<{\s]+)\s*(.*?)</tool_call>", r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>"),
    (r'<(?:\w+:)?invoke name="([^"]+)">(.*?)</(?:\w+:)?invoke>', r'<(?:\w+:)?parameter name="([^"]+)"[^>]*>(.*?)</(?:\w+:)?parameter>'),
)  # fmt: skip
"""How Qwen's coders, GLM, and MiniMax write a call, and in it each argument."""


def _in_xml(text: str) -> Iterator[Call]:
    for call, argument in _XML:
        for name, inside in re.findall(call, text, re.DOTALL):
            yield Call(name, dict(re.findall(argument, inside, re.DOTALL)), as_texts=True)


_GEMMAS_STRING = re.compile(r'<\|"\|>(.*?)<\|"\|>', re.DOTALL)


def _in_gemmas(text: str) -> Iterator[Call]:
    """`call:NAME{KEY:<|"|>TEXT<|"|>,KEY:2}`."""
    texts = [json.dumps(found) for found in _GEMMAS_STRING.findall(text)]
    text = _GEMMAS_STRING.sub('"\x00"', text)  # so that nothing in them is taken for notation
    for found in re.finditer(r"call:([\w.-]+)(\{)", text):
        plain = text[found.start(2) : _closing(text, found.start(2))]
        plain = re.sub(r"\bNone\b", "null", re.sub(r"([{,]\s*)([\w.-]+)\s*:", r'\1"\2":', plain))
        for string in texts[text.count('"\x00"', 0, found.start()) :]:
            plain = plain.replace('"\x00"', string, 1)
        yield Call(found[1], parse_json(plain))


def _closing(text: str, start: int) -> int:
    """Where the braces that open there are closed; the end of the text if they are not."""
    depth = 0
    for at in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if not depth:
            return at + 1
    return len(text)


def _in_python(text: str) -> Iterator[Call]:
    """`[NAME(KEY='TEXT', KEY=2)]`; constants may be JSON's."""
    found = re.search(r"\[\s*[A-Za-z_][\w.]*\(.*\)\s*\]", text, re.DOTALL)
    tree = _PythonConstants().visit(ast.parse(found[0], mode="eval")).body if found else ast.List([])
    for call in tree.elts:
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError("not a list of calls by keyword")
        yield Call(ast.unparse(call.func), {str(k.arg): ast.literal_eval(k.value) for k in call.keywords})


class _PythonConstants(ast.NodeTransformer):
    def visit_Name(self, node: ast.Name) -> ast.expr:
        known = {"true": True, "false": False, "null": None}
        return ast.Constant(known[node.id]) if node.id in known else node


_NAMED = (
    re.compile(r"to=(?:functions\.)?([\w.-]+)[^{]*$"),
    re.compile(r"(?:functions\.)?([A-Za-z_][\w.-]*)(?::\d+)?\s*(?:<[^<>]*>|\[ARGS\]|\n```json)\s*$"),
)
"""A name before arguments in JSON: GPT-OSS's; Mistral's, Kimi's and DeepSeek's."""


def _in_json(text: str) -> Iterator[Call]:
    """Objects with a name and arguments, or arguments after a name."""
    at = end = 0
    while (at := text.find("{", at)) >= 0:
        try:
            value, after = value_at(text, at)
        except ValueError:
            at += 1
            continue
        call = value["function"] if isinstance(value.get("function"), dict) else value
        name = next((call[key] for key in ("name", "tool_name") if isinstance(call.get(key), str)), None)
        arguments = next((call[key] for key in ("arguments", "parameters", "args") if key in call), None)
        if name is None or arguments is None:
            before = next((found[1] for named in _NAMED if (found := named.search(text[end:at]))), None)
            name, arguments = before, value
        if name is not None:
            arguments = parse_json(arguments) if isinstance(arguments, str) else arguments
            yield Call(name, arguments if isinstance(arguments, dict) else {"": arguments})
        at = end = after
