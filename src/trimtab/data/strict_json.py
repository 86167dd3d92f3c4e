"""JSON, without what it leaves unclear: keys that are given twice, NaN, and halves of characters are refused."""

import json
import re
from typing import Any

from trimtab.data.example import RawRow, Refusal

_SPACE = re.compile(r"\s*")
_HALF = re.compile(r"\\u[dD][89a-fA-F]")
"""The escape for half of a UTF-16 character; fine in pairs."""


def parse_json(text: str) -> Any:
    """The value that a text is. Raises ValueError, with the reason, for what is not JSON or would be read in two ways."""
    value, end = value_at(text, after_space(text, 0))
    if after_space(text, end) < len(text):
        raise ValueError(f"something follows it{place_in(text, after_space(text, end))}")
    return value


def value_at(text: str, start: int) -> tuple[Any, int]:
    """The JSON value that starts there, and where it ends. Raises ValueError with the reason."""
    try:
        value, end = _JSON.raw_decode(text, start)
        if _HALF.search(text, start, end):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg.removesuffix(' at')}{place_in(text, error.pos)}") from None
    except UnicodeEncodeError:
        raise ValueError("a \\u escape in it is half of a character") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value, end


def end_of(text: str, start: int) -> int | None:
    """Where a value that was refused ends; None if it is broken, for then nobody can know."""
    try:
        return json.JSONDecoder().raw_decode(text, start)[1]
    except (ValueError, RecursionError):
        return None


def after_space(text: str, at: int) -> int:
    """Where white space that starts there ends."""
    found = _SPACE.match(text, at)
    return found.end() if found else at


def place_in(text: str, at: int) -> str:
    """` at column 3`, and in which line if there are several."""
    line, column = text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)
    return f" at line {line}, column {column}" if "\n" in text else f" at column {column}"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} is given twice")
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


_JSON = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_refuse_constant)


def row_of(where: str, value: Any) -> RawRow | Refusal:
    """A value as a row, if it is one."""
    if not isinstance(value, dict):
        return Refusal(where, f"a row is an object with named columns, not {kind(value)}")
    return where, value


def kind(value: Any) -> str:
    """What a value is, in a reader's words."""
    numbers = dict.fromkeys((int, float), "a number")
    words = {str: "a string", list: "a list", dict: "an object", bool: "a true/false value", type(None): "null", **numbers}
    return words.get(type(value), type(value).__name__)
