"""The formats of examples in which answers are compared with each other, or judged one by one.

| format | columns |
|---|---|
| pair after a prompt | `prompt`, `chosen`, `rejected`: texts, messages or lists of messages |
| pair after turns | `messages` or `conversations`, `chosen`, `rejected`: an answer each, as a text or a turn |
| pair after an instruction | `instruction`, `chosen`, `rejected`, and Alpaca's other columns: texts |
| pair of conversations | `chosen`, `rejected`: lists of messages that begin alike |
| judged | the columns of any format of answers, and `label` (or `kto_tag`): true for a good answer |
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from trimtab.data.example import Conversation, Example, InvalidExample, Judged, Kind, Preference
from trimtab.data.formats import ANSWERS, OF_ANY, Format
from trimtab.data.messages import ROLES
from trimtab.data.strict_json import kind

_readers = {format.required: format.read for format in ANSWERS}
SIDES = ("chosen", "rejected")

WithAnswer = Callable[[dict[str, Any], Any, str], dict[str, Any]]
"""(row of a pair, answer, its column) -> the row of another format that has this one answer."""


def _pair_after(columns: tuple[str, ...], with_answer: WithAnswer) -> Any:
    """How to read a pair whose prompt is in a column of its own, by the format with these columns."""

    def read(row: dict[str, Any], where: str) -> Example:
        if all(_holds_prompt(row[side]) for side in SIDES):
            return _pair_of_conversations(row, where)
        return _pair(where, *(_read_side(columns, with_answer(row, row[side], side), where, side) for side in SIDES))

    return read


def _pair_of_conversations(row: dict[str, Any], where: str) -> Example:
    """Both answers with the messages before them."""
    both = []
    for side in SIDES:
        if not isinstance(row[side], list):
            raise InvalidExample(f"{side} is {_shown(row[side])}, not a list of messages, and no other column holds a prompt")
        conversation = {"messages": row[side], **_of_any(row)}
        both.append(_read_side(("messages",), conversation, where, side))
    prompt = row.get("prompt")
    if isinstance(prompt, str) and all(prompt.strip() != m["content"].strip() for m in both[0].messages[:-1]):
        raise InvalidExample("chosen and rejected are whole conversations, and the prompt is in neither of them")
    return _pair(where, *both)


def _of_any(row: dict[str, Any]) -> dict[str, Any]:
    """The columns that conversations of every format may have."""
    return {name: row.get(name) for name in OF_ANY}


def _read_side(columns: tuple[str, ...], row: dict[str, Any], where: str, side: str) -> Conversation:
    try:
        example = _readers[columns](row, where)
    except InvalidExample as invalid:
        raise InvalidExample(f"with {side}: {invalid}") from None
    return _last_answer_only(example, side)


def _holds_prompt(answer: Any) -> bool:
    """A list of messages that does not begin with the assistant's."""
    return isinstance(answer, list) and bool(answer) and isinstance(answer[0], dict) and _role(answer[0]) != "assistant"


def _role(turn: dict[str, Any]) -> Any:
    role = turn.get("role", turn.get("from"))
    return ROLES.get(role.strip().lower(), role) if isinstance(role, str) else role


def _append_turn(column: str) -> WithAnswer:
    def with_answer(row: dict[str, Any], answer: Any, side: str) -> dict[str, Any]:
        if isinstance(answer, list) and len(answer) == 1:
            answer = answer[0]
        if isinstance(answer, str):
            answer = {"role": "assistant", "content": answer}
        if not isinstance(answer, dict):
            raise InvalidExample(f"{side} is {_shown(answer)}, not one answer: a text, or a turn")
        if not isinstance(row[column], list) or not row[column]:
            raise InvalidExample(f"{column} is {_shown(row[column])}, not a list of turns")
        return {**row, column: [*row[column], answer]}

    return with_answer


def _complete(row: dict[str, Any], answer: Any, side: str) -> dict[str, Any]:
    prompt = row["prompt"]
    if isinstance(answer, dict):
        answer = [answer]
    if isinstance(answer, list) and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, list) and isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    return {"prompt": prompt, "completion": answer, **_of_any(row)}


def _follow_instruction(row: dict[str, Any], answer: Any, side: str) -> dict[str, Any]:
    if not isinstance(answer, str):
        raise InvalidExample(f"{side} is {_shown(answer)}, not a text")
    return {**row, "output": answer}


def _last_answer_only(example: Example, name: str) -> Conversation:
    """The conversation, of which only the last message is trained on."""
    assert isinstance(example, Conversation), "formats of plain texts are not among those that are compared or judged"
    last = len(example.messages) - 1
    if example.messages[last]["role"] != "assistant":
        raise InvalidExample(f"{name} does not end with a message of the assistant's")
    for n, weight in example.weights.items():
        if weight not in (0, 1) or (n == last and not weight):
            raise InvalidExample(
                f"messages[{n}] of {name} has weight {weight:g}; answers that are compared or judged have weight 1, and other messages "
                "are not trained on, so leave weights out (data.ignore=[weight])"
            )
    return replace(example, weights={n: float(n == last) for n in range(last + 1)})


def _pair(where: str, chosen: Conversation, rejected: Conversation) -> Example:
    if chosen.messages[:-1] != rejected.messages[:-1]:
        raise InvalidExample("chosen and rejected answer different prompts, so they can't be compared")
    if chosen.messages[-1] == rejected.messages[-1]:
        raise InvalidExample("chosen and rejected are the same answer, so neither is the better one")
    return Preference(chosen, rejected, where)


def _judged(format: Format, label: str) -> Format:
    def read(row: dict[str, Any], where: str) -> Example:
        good = row[label]
        if isinstance(good, str):
            good = {"true": True, "1": True, "false": False, "0": False}.get(good.strip().lower(), good)
        if good not in (True, False):
            raise InvalidExample(f"{label} is {_shown(row[label])}, not true (a good answer) or false (a bad one)")
        return Judged(_last_answer_only(format.read(row, where), "the conversation"), bool(good), where)

    return Format((*format.required, label), format.optional, read)


def _as_judged(format: Format) -> Format:
    def read(row: dict[str, Any], where: str) -> Example:
        pair = format.read(row, where)
        assert isinstance(pair, Preference)
        return replace(pair, as_judged=True)

    return format._replace(read=read)


def _shown(value: Any) -> str:
    return f"{kind(value)} ({value!r})" if isinstance(value, str | int | float | bool) else kind(value)


PAIRS = (
    Format(("prompt", *SIDES), OF_ANY, _pair_after(("prompt", "completion"), _complete)),
    Format(("messages", *SIDES), OF_ANY, _pair_after(("messages",), _append_turn("messages"))),
    Format(("conversations", *SIDES), OF_ANY, _pair_after(("conversations",), _append_turn("conversations"))),
    Format(
        ("instruction", *SIDES),
        ("input", "history", *OF_ANY),
        _pair_after(("instruction", "output"), _follow_instruction),
    ),
    Format(SIDES, OF_ANY, _pair_of_conversations),
)
JUDGED = tuple(_judged(format, label) for format in ANSWERS if format.required != ("text",) for label in ("label", "kto_tag"))

FORMATS: dict[Kind, tuple[Format, ...]] = {"answers": ANSWERS, "pairs": PAIRS, "judged": (*JUDGED, *map(_as_judged, PAIRS))}
"""The formats that each kind of example comes in."""
