"""The shapes that rows of answers come in, told apart by their columns; there is no registry to fill in.

| shape | columns |
|---|---|
| OpenAI | `messages`: [{`role`, `content`, `tool_calls`, `weight`}], `tools` |
| ShareGPT | `conversations`: [{`from`, `value`, `weight`}], `system`, `tools` |
| Alpaca / BELLE | `instruction`, `input`, `output`, `system`, `history`: [[question, answer]] |
| prompt and completion | `prompt`, `completion`: both texts or both lists of messages |
| text | `text` |
"""

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from trimtab.data.example import Account, Conversation, Example, Refusal, Refused, Text
from trimtab.data.read import Row, kind
from trimtab.data.strict_json import parse_json


class Shape(NamedTuple):
    required: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[dict[str, Any], str], Example]

    @property
    def columns(self) -> set[str]:
        return {*self.required, *self.optional}


COMPARED = {"chosen", "rejected"}
FOR_ANOTHER = "compares two answers, which this objective does not learn from: dpo does, for one"

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "bing": "assistant",
    "bard": "assistant", "system": "system", "function_call": "function_call", "observation": "tool", "tool": "tool",
}  # fmt: skip


def read_examples(
    rows: Iterable[Row | Refusal], columns: Mapping[Any, str], account: Account, shapes: Sequence[Shape] | None = None
) -> Iterator[Example]:
    """Rows as examples, one by one; what can't be used goes to the account, with its reason.

    Args:
        shapes: What they can be read as; answers unless given.
        columns: What Trimtab calls a column -> what the data calls it.
    """
    for row in rows:
        if isinstance(row, Refusal):
            account.refused.append(row)
            continue
        where, values = row
        try:
            shape, renamed = _shape_of(values, columns, ANSWERS if shapes is None else shapes)
            example = shape.read(renamed, where)
        except Refused as refused:
            pair = COMPARED.issubset(values) and not any(COMPARED.issubset(shape.required) for shape in shapes or ANSWERS)
            account.refused.append(Refusal(where, FOR_ANOTHER if pair else str(refused)))
            continue
        account.unread.update(values.keys() - {columns.get(column, column) for column in shape.columns})
        yield example


def _shape_of(row: dict[str, Any], columns: Mapping[Any, str], shapes: Sequence[Shape]) -> tuple[Shape, dict[str, Any]]:
    """The only shape that fits, and the row with our names. What data.columns names goes before what is called so."""
    for ours, theirs in columns.items():
        if theirs not in row:
            raise Refused(f"has no column {theirs!r}, which data.columns says is the {ours}; it has {_names(row)}")
    renamed = {name: value for name, value in row.items() if name not in columns.values()}
    renamed |= {ours: row[theirs] for ours, theirs in columns.items()}
    allowed = [shape for shape in shapes if columns.keys() <= shape.columns]
    there = {column for column, value in renamed.items() if value is not None}
    fitting = [shape for shape in allowed if there.issuperset(shape.required)]
    fitting = [one for one in fitting if not any(set(one.required) < set(other.required) for other in fitting)]
    if len(fitting) == 1:
        return fitting[0], renamed
    if fitting:
        both = " and ".join("/".join(shape.required) for shape in fitting)
        one = fitting[0].required[0]
        raise Refused(f"could be read as {both}: keep the columns of one, or say which (data.columns.{one}={one})")
    if not allowed:
        raise Refused(f"data.columns names {', '.join(columns)}, which no shape has together")
    raise Refused(_missing(renamed, allowed))


def _missing(row: dict[str, Any], shapes: list[Shape]) -> str:
    partly = [shape for shape in shapes if any(column in row for column in shape.required)]
    if partly:
        closest = max(partly, key=lambda shape: sum(row.get(column) is not None for column in shape.required))
        absent = next(column for column in closest.required if row.get(column) is None)
        present = [column for column in closest.required if row.get(column) is not None]
        beside = f" beside {', '.join(present)}" if present else ""
        if absent in row:
            return f"column {absent!r} is null{beside}; the row has {_names(row)}"
        others = {str(name).lower(): name for name in row if name not in closest.columns}
        near = [others[name] for name in difflib.get_close_matches(absent, others, n=1)]
        hint = f" (is it {near[0]!r}? Then say data.columns.{absent}={near[0]})" if near else ""
        return f"column {absent!r} is missing{beside}{hint}; the row has {_names(row)}"
    known = "; ".join(", ".join(shape.required) for shape in shapes)
    return f"has {_names(row)}, which fits no shape ({known}). Name them with data.columns, e.g. data.columns.prompt=question"


def _names(row: dict[str, Any]) -> str:
    return ", ".join(name or "a column without a name" for name in row) or "no columns"


def _text(value: Any, what: str, *, empty: bool = False) -> str:
    if isinstance(value, list) and value and all(isinstance(p, dict) and p.get("type") == "text" for p in value):
        value = "".join(_text(part.get("text"), what, empty=True) for part in value)  # OpenAI's content parts
    if not isinstance(value, str):
        raise Refused(f"{what} is {kind(value)}, not a text")
    if not empty and not value.strip():
        raise Refused(f"{what} is empty")
    return value


def _messages(raw: Any, what: str) -> tuple[list[dict[str, Any]], set[int]]:
    """Messages in the form that chat templates read, and the indices of those not to learn."""
    if not isinstance(raw, list) or not raw:
        raise Refused(f"{what} is {'an empty list' if raw == [] else kind(raw)}, not a list of messages")
    messages, silent = [], set()
    for number, message in enumerate(raw):
        name = f"{what}[{number}]"
        if not isinstance(message, dict) or "role" not in message:
            raise Refused(f"{name} is not a message with role and content")
        role = "system" if message["role"] == "developer" else message["role"]
        if role not in ROLES:
            raise Refused(f"{name}.role is {role!r}, not one of {', '.join(ROLES)}")
        if message.get("function_call"):
            raise Refused(f"{name}.function_call is the old form of tool_calls, which no template reads: write tool_calls")
        calls = message.get("tool_calls") or None
        content = message.get("content")
        content = "" if calls and content is None else _text(content, f"{name}.content", empty=bool(calls))
        kept = {key: value for key, value in message.items() if key not in ("weight", "tool_calls") and value is not None}
        kept |= {"role": role, "content": content}
        if calls:
            kept["tool_calls"] = _tool_calls(calls, name)
        if _is_silent(message, name):
            silent.add(number)
        messages.append(kept)
    return messages, silent


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
            arguments = _json(arguments or "{}", f"{name}.tool_calls: {what}")
        if not isinstance(arguments, dict | None):
            raise Refused(f"{name}.tool_calls: {what} are {kind(arguments)}, not an object")
        fixed.append({**call, "type": "function", "function": {**function, "arguments": arguments or {}}})
    return fixed


def _json(text: str, what: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise Refused(f"{what}: not valid JSON: {error}") from None


def _tools(raw: Any) -> tuple[Any, ...]:
    if isinstance(raw, str):
        raw = _json(raw, "tools") if raw.strip() else []
    if raw is not None and not isinstance(raw, list):
        raise Refused(f"tools is {kind(raw)}, not a list of tool descriptions")
    return tuple(raw or ())


def _conversation(
    messages: list[dict[str, Any]], where: str, tools: Any = None, silent: Iterable[int] = (), continues: bool = False
) -> Conversation:
    silent = frozenset(silent)
    spoken = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    if not spoken:
        raise Refused("no message is the assistant's, so there is nothing to learn")
    if silent.issuperset(spoken):
        raise Refused("every assistant message has weight 0, so there is nothing to learn")
    return Conversation(tuple(messages), where, _tools(tools), silent, continues)


def _openai(row: dict[str, Any], where: str) -> Example:
    messages, silent = _messages(row["messages"], "messages")
    return _conversation(messages, where, row.get("tools"), silent)


def _sharegpt(row: dict[str, Any], where: str) -> Example:
    turns = row["conversations"]
    if not isinstance(turns, list) or not turns:
        raise Refused(f"conversations is {'an empty list' if turns == [] else kind(turns)}, not a list of turns")
    messages, silent = _system(row), set()
    for number, turn in enumerate(turns):
        name = f"conversations[{number}]"
        if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
            raise Refused(f"{name} is not a turn with `from` and `value`")
        role = SHAREGPT_ROLES.get(turn["from"]) if isinstance(turn["from"], str) else None
        if role is None:
            raise Refused(f"{name}.from is {turn['from']!r}, not one of {', '.join(SHAREGPT_ROLES)}")
        value = _text(turn["value"], f"{name}.value")
        if _is_silent(turn, name):
            silent.add(len(messages))
        if role == "function_call":
            messages.append({"role": "assistant", "content": "", "tool_calls": _function_call(value, name)})
        else:
            messages.append({"role": role, "content": value})
    return _conversation(messages, where, row.get("tools"), silent)


def _function_call(value: str, name: str) -> list[dict[str, Any]]:
    calls = _json(value, f"{name}: the function_call")
    calls = calls if isinstance(calls, list) else [calls]
    return _tool_calls([{"type": "function", "function": call} for call in calls], name)


def _alpaca(row: dict[str, Any], where: str) -> Example:
    messages = _system(row)
    history = row.get("history") or []
    for number, pair in enumerate(history if isinstance(history, list) else [history]):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise Refused(f"history[{number}] is not a pair of question and answer")
        messages.append({"role": "user", "content": _text(pair[0], f"history[{number}][0]")})
        messages.append({"role": "assistant", "content": _text(pair[1], f"history[{number}][1]")})
    question = _text(row["instruction"], "instruction")
    beside = row.get("input")
    if beside is not None and _text(beside, "input", empty=True).strip():
        question = f"{question}\n{beside}"
    messages.append({"role": "user", "content": question})
    messages.append({"role": "assistant", "content": _text(row["output"], "output")})
    return _conversation(messages, where)


def _system(row: dict[str, Any]) -> list[dict[str, Any]]:
    system = row.get("system")
    return [{"role": "system", "content": _text(system, "system")}] if system not in (None, "") else []


def _prompt_completion(row: dict[str, Any], where: str) -> Example:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) or isinstance(completion, list):
        asked, _ = _messages(prompt, "prompt")
        answered, silent = _messages(completion, "completion")
        if all(message["role"] != "assistant" for message in answered):
            raise Refused("no message of the completion is the assistant's, so there is nothing to learn")
        # What stands in the prompt is given, not learned, whoever said it.
        given = [n for n, message in enumerate(asked) if message["role"] == "assistant"]
        return _conversation(asked + answered, where, row.get("tools"), [*given, *(n + len(asked) for n in silent)])
    messages = [
        {"role": "user", "content": _text(prompt, "prompt")},
        {"role": "assistant", "content": _text(completion, "completion")},
    ]
    return _conversation(messages, where, continues=True)


def _plain(row: dict[str, Any], where: str) -> Example:
    return Text(_text(row["text"], "text"), where)


ANSWERS = (
    Shape(("messages",), ("tools",), _openai),
    Shape(("conversations",), ("system", "tools"), _sharegpt),
    Shape(("instruction", "output"), ("input", "system", "history"), _alpaca),
    Shape(("prompt", "completion"), ("tools",), _prompt_completion),
    Shape(("text",), (), _plain),
)
