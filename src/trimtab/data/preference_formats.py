"""The shapes of rows in which answers are compared with each other, or judged one by one.

| shape | columns |
|---|---|
| pair after a prompt | `prompt`, `chosen`, `rejected`: texts, messages or lists of messages |
| pair after turns | `messages` or `conversations`, `chosen`, `rejected`: an answer each, as a text or a turn |
| pair after an instruction | `instruction`, `chosen`, `rejected`, and Alpaca's other columns: texts |
| pair of conversations | `chosen`, `rejected`: lists of messages that begin alike |
| judged | the columns of any shape of answers, and `label` (or `kto_tag`): true for a good answer |
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from trimtab.data.example import Conversation, Example, Judged, Kind, Preference, Refused
from trimtab.data.formats import ANSWERS, Shape
from trimtab.data.messages import ROLES
from trimtab.data.strict_json import kind

_answers = {shape.required: shape.read for shape in ANSWERS}
SIDES = ("chosen", "rejected")


def _after(columns: tuple[str, ...], answered: Callable[[dict[str, Any], Any, str], dict[str, Any]]) -> Any:
    """How to read a pair whose prompt stands in a column of its own.

    Args:
        columns: Of the shape that the prompt makes with one answer.
        answered: The row as that shape, from the row, an answer and its column.
    """

    def read(row: dict[str, Any], where: str) -> Example:
        if all(_is_whole(row[side]) for side in SIDES):
            return _whole_conversations(row, where)
        both = []
        for side in SIDES:
            asked = answered(row, row[side], side)
            try:
                both.append(_last_alone(_answers[columns](asked, where), side))
            except Refused as refused:
                raise Refused(f"with {side}: {refused}") from None
        return _pair(both[0], both[1], where)

    return read


def _is_whole(answer: Any) -> bool:
    """A list of messages that does not begin with the assistant's: the prompt is in it."""
    return isinstance(answer, list) and bool(answer) and isinstance(answer[0], dict) and _role(answer[0]) != "assistant"


def _role(turn: dict[str, Any]) -> Any:
    word = turn.get("role", turn.get("from"))
    return ROLES.get(word.strip().lower(), word) if isinstance(word, str) else word


def _turns(column: str) -> Callable[[dict[str, Any], Any, str], dict[str, Any]]:
    """A row of turns, with an answer as its last turn."""

    def answered(row: dict[str, Any], answer: Any, side: str) -> dict[str, Any]:
        if isinstance(answer, list) and len(answer) == 1:
            answer = answer[0]
        if isinstance(answer, str):
            answer = {"role": "assistant", "content": answer}
        if not isinstance(answer, dict):
            raise Refused(f"{side} is {_shown(answer)}, not one answer: a text, or a turn")
        if not isinstance(row[column], list) or not row[column]:
            raise Refused(f"{column} is {_shown(row[column])}, not a list of turns")
        return {**row, column: [*row[column], answer]}

    return answered


def _completed(row: dict[str, Any], answer: Any, side: str) -> dict[str, Any]:
    """A row of prompt and completion."""
    prompt = row["prompt"]
    if isinstance(answer, dict):
        answer = [answer]
    if isinstance(answer, list) and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, list) and isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    return {"prompt": prompt, "completion": answer, "system": row.get("system"), "tools": row.get("tools")}


def _instructed(row: dict[str, Any], answer: Any, side: str) -> dict[str, Any]:
    if not isinstance(answer, str):
        raise Refused(f"{side} is {_shown(answer)}, not a text")
    return {**row, "output": answer}


def _whole_conversations(row: dict[str, Any], where: str) -> Example:
    """Both answers with what comes before them."""
    both: list[Conversation] = []
    for side in SIDES:
        if not isinstance(row[side], list):
            raise Refused(f"{side} is {_shown(row[side])}, not a list of messages, and no prompt stands in another column")
        asked = {"messages": row[side], "system": row.get("system"), "tools": row.get("tools")}
        try:
            answered = _answers["messages",](asked, where)
        except Refused as refused:
            raise Refused(f"with {side}: {refused}") from None
        both.append(_last_alone(answered, side))
    prompt = row.get("prompt")
    if isinstance(prompt, str) and all(prompt.strip() != m["content"].strip() for m in both[0].messages[:-1]):
        raise Refused("chosen and rejected are whole conversations, and the prompt is in neither of them")
    return _pair(both[0], both[1], where)


def _last_alone(example: Example, what: str) -> Conversation:
    """The conversation, of which the last message alone is learned."""
    assert isinstance(example, Conversation), "shapes of plain texts are not among those that are compared or judged"
    last = len(example.messages) - 1
    if example.messages[last]["role"] != "assistant":
        raise Refused(f"{what} does not end with a message of the assistant's")
    spoken = {n for n, message in enumerate(example.messages) if message["role"] == "assistant"}
    return replace(example, silent=frozenset(spoken - {last}))


def _pair(chosen: Conversation, rejected: Conversation, where: str) -> Example:
    if chosen.messages[:-1] != rejected.messages[:-1]:
        raise Refused("chosen and rejected answer different prompts, so they can't be compared")
    if chosen.messages[-1] == rejected.messages[-1]:
        raise Refused("chosen and rejected are the same answer, so neither is the better one")
    return Preference(chosen, rejected, where)


def _judged(shape: Shape, label: str) -> Shape:
    def read(row: dict[str, Any], where: str) -> Example:
        good = row[label]
        if isinstance(good, str):
            good = {"true": True, "1": True, "false": False, "0": False}.get(good.strip().lower(), good)
        if good not in (True, False):
            raise Refused(f"{label} is {_shown(row[label])}, not true (a good answer) or false (a bad one)")
        return Judged(_last_alone(shape.read(row, where), "the conversation"), bool(good), where)

    return Shape((*shape.required, label), shape.optional, read)


def _apart(shape: Shape) -> Shape:
    def read(row: dict[str, Any], where: str) -> Example:
        pair = shape.read(row, where)
        assert isinstance(pair, Preference)
        return replace(pair, apart=True)

    return shape._replace(read=read)


def _shown(value: Any) -> str:
    return f"{kind(value)} ({value!r})" if isinstance(value, str | int | float | bool) else kind(value)


PAIRS = (
    Shape(("prompt", *SIDES), ("system", "tools"), _after(("prompt", "completion"), _completed)),
    Shape(("messages", *SIDES), ("system", "tools"), _after(("messages",), _turns("messages"))),
    Shape(("conversations", *SIDES), ("system", "tools"), _after(("conversations",), _turns("conversations"))),
    Shape(("instruction", *SIDES), ("input", "system", "history", "tools"), _after(("instruction", "output"), _instructed)),
    Shape(SIDES, ("system", "tools"), _whole_conversations),
)
JUDGED = tuple(_judged(shape, label) for shape in ANSWERS if shape.required != ("text",) for label in ("label", "kto_tag"))

SHAPES: dict[Kind, tuple[Shape, ...]] = {"answers": ANSWERS, "pairs": PAIRS, "judged": (*JUDGED, *map(_apart, PAIRS))}
"""The shapes that each kind of row comes in."""
