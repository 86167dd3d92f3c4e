"""JSON files: a row a line, an array of rows, rows one after the other over several lines, or an object that holds an array of them."""

import re
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from trimtab.data.example import COLUMNS, Account, RawRow, Refusal
from trimtab.data.strict_json import after_space, end_of, parse_json, place_in, row_of, value_at
from trimtab.data.text_files import open_text


def json_file(path: Path, account: Account) -> Iterator[RawRow | Refusal]:
    """The rows of a JSON file, whatever its ending: what stands in it says which way it holds them."""
    with open_text(path) as file:
        lines = (line.strip() for line in file if line.strip())
        first, second = next(lines, ""), next(lines, "")
    alone = _parsed(first)
    if first.startswith("[") and (".json" in path.suffixes or alone is None or not second):
        yield from _rows_of_array(path, _text(path))
    elif first.startswith("{") and (alone is None or (not second and (_rows_within(alone) or _by_column(alone)))):
        yield from _objects(path, account)
    else:
        yield from _lines(path)


def _parsed(line: str) -> Any:
    with suppress(ValueError):
        return parse_json(line)
    return None


def _text(path: Path) -> str:
    with open_text(path) as file:
        return file.read()


def _lines(path: Path) -> Iterator[RawRow | Refusal]:
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path}:{number}"
                try:
                    yield row_of(where, parse_json(line.rstrip("\n")))
                except ValueError as error:
                    yield Refusal(where, f"not valid JSON: {error}")


def _objects(path: Path, account: Account) -> Iterator[RawRow | Refusal]:
    """Objects one after the other that go over several lines each; or the only one, which holds the array of rows."""
    text = _text(path)
    place, at = _placing(path, text), after_space(text, 0)
    try:
        value, end = value_at(text, at)
    except ValueError:
        end = at
    if "\n" not in text[at:end] and after_space(text, end) < len(text):
        yield from _lines(path)  # the first line is broken, and others may be whole
        return
    after = after_space(text, end)
    within = _rows_within(value) if after == len(text) else None
    if within is not None:
        account.unread |= value.keys() - {within}
        yield from _rows_of_array(path, text, _start_of(within, text, at))
        return
    if after == len(text) and (reason := _by_column(value)):
        yield Refusal(place(at), reason)
        return
    while True:
        yield row_of(place(at), value)
        at = after_space(text, end)
        if at == len(text):
            return
        try:
            value, end = value_at(text, at)
        except ValueError as error:
            yield Refusal(place(at), f"not valid JSON: {error}; nothing after it can be read")
            return


def _rows_within(value: Any) -> str | None:
    """The key under which an object holds all rows, if it is one that does: a list of objects that are no messages, and no columns."""
    if not isinstance(value, dict) or COLUMNS & value.keys():
        return None
    lists = [
        key for key, inner in value.items() if isinstance(inner, list) and inner and all(isinstance(o, dict) for o in inner)
    ]
    if len(lists) != 1 or any({"role", "from"} & one.keys() for one in value[lists[0]]):
        return None
    return lists[0]


def _by_column(value: Any) -> str | None:
    """What to say of a table that is written column by column."""
    columns = list(value.values()) if isinstance(value, dict) else []
    if len(columns) > 1 and all(isinstance(one, dict) and one.keys() == columns[0].keys() != set() for one in columns):
        return "a table by columns, as pandas writes it: write it by rows, with to_json(path, orient='records', lines=True)"
    alike = len(columns) > 1 and all(isinstance(one, list) and len(one) == len(columns[0]) > 0 for one in columns)
    if alike and not any(isinstance(inner, dict) for one in columns for inner in one):
        return "a table by columns: write it by rows, as a JSON array of objects, or an object a line"
    return None


def _start_of(key: str, text: str, at: int) -> int:
    """Where in an object the value of a key starts."""
    at = after_space(text, at + 1)
    while True:
        name, end = value_at(text, at)
        start = after_space(text, after_space(text, end) + 1)  # behind the colon
        if name == key:
            return start
        at = after_space(text, after_space(text, value_at(text, start)[1]) + 1)  # behind the comma


def _placing(path: Path, text: str) -> Callable[[int], str]:
    """The line that a character stands in; and its column, if a row was in that line before."""
    breaks = [-1, *(found.start() for found in re.finditer("\n", text))]
    last = 0

    def place(at: int) -> str:
        nonlocal last
        line, before = bisect_left(breaks, at), last
        last = line
        return f"{path}:{line}" if line != before else f"{path}:{line}:{at - breaks[line - 1]}"

    return place


def _rows_of_array(path: Path, text: str, at: int | None = None) -> Iterator[RawRow | Refusal]:
    """The rows of the array that starts there; the whole file is one unless told."""
    place, whole = _placing(path, text), at is None
    at = after_space(text, (text.index("[") if at is None else at) + 1)
    more = text[at : at + 1] != "]"
    while more:
        where = place(at)
        try:
            value, end = value_at(text, at)
            yield row_of(where, value)
        except ValueError as error:
            after = end_of(text, at)
            yield Refusal(where, f"not valid JSON: {error}" + ("; nothing after it can be read" if after is None else ""))
            if after is None:
                return
            end = after
        at = after_space(text, end)
        if text[at : at + 1] not in (",", "]"):
            reason = f"not valid JSON: expected ',' or ']' after a row{place_in(text, end)}; nothing after it can be read"
            yield Refusal(place(end), reason)
            return
        more = text[at] == ","
        if more:
            at = after_space(text, at + 1)
    rest = after_space(text, at + 1)
    if whole and rest < len(text):
        yield Refusal(place(rest), "text follows the end of the JSON array; it was not read")
