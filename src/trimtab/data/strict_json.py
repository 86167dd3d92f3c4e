"""JSON without its ambiguities: repeated keys, NaN, and unpaired surrogates are errors."""

import json
import re
from typing import Any

from trimtab.data.example import RawRow, RejectedExample

_SPACE = re.compile(r"\s*")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
"""The escape of a UTF-16 surrogate, which is valid in pairs."""


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError, with the reason, for what is not JSON or is ambiguous."""
    value, end = value_at(text, after_space(text, 0))
    if after_space(text, end) < len(text):
        raise ValueError(f"something follows it{place_in(text, after_space(text, end))}")
    return value


def value_at(text: str, start: int) -> tuple[Any, int]:
    """The JSON value that starts there, and where it ends. Raises ValueError with the reason."""
    try:
        value, end = _JSON.raw_decode(text, start)
        if _SURROGATE.search(text, start, end):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg.removesuffix(' at')}{place_in(text, error.pos)}") from None
    except UnicodeEncodeError:
        raise ValueError("a \\u escape in it is an unpaired surrogate") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value, end


def is_object(text: str) -> bool:
    """Whether a text is one JSON object, and nothing else."""
    try:
        return text.lstrip().startswith("{") and isinstance(parse_json(text), dict)
    except ValueError:
        return False


def end_of(text: str, start: int) -> int | None:
    """Where an ambiguous value ends; None for what is not JSON, whose end cannot be known."""
    try:
        return json.JSONDecoder().raw_decode(text, start)[1]
    except (ValueError, RecursionError):
        return None


def after_space(text: str, at: int) -> int:
    """Where white space that starts there ends."""
    space = _SPACE.match(text, at)
    return space.end() if space else at


def place_in(text: str, at: int) -> str:
    """` at column 3`, with the line if there are several."""
    line, column = text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)
    return f" at line {line}, column {column}" if "\n" in text else f" at column {column}"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} is given twice")
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


_JSON = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_refuse_constant)


def row_of(where: str, value: Any) -> RawRow | RejectedExample:
    """A value as a row, if it is an object."""
    if not isinstance(value, dict):
        return RejectedExample(where, f"an example is an object with named columns, not {kind(value)}")
    return where, value


def kind(value: Any) -> str:
    """What kind of JSON value it is, for messages."""
    numbers = dict.fromkeys((int, float), "a number")
    names = {str: "a string", list: "a list", dict: "an object", bool: "a true/false value", type(None): "null", **numbers}
    return names.get(type(value), type(value).__name__)
