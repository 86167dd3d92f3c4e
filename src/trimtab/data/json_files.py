"""JSON files: a row a line, an array of rows, rows one after the other over several lines, or an object that holds an array of them."""

import io
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from trimtab.core.errors import DataError
from trimtab.data.example import COLUMNS, RawRow, RejectedExample, SourceReport
from trimtab.data.strict_json import after_space, end_of, parse_json, place_in, row_of, value_at
from trimtab.data.text_files import open_text


def json_file(path: Path, report: SourceReport, most: int | None = None) -> Iterator[RawRow | RejectedExample]:
    """The rows of a JSON file, whatever its ending: its content says which layout it has.

    Args:
        most: The most characters of a file that is read whole, as all but a row a line is. Raises DataError for a longer one.
    """
    with open_text(path) as file:
        lines = (
            line.strip() for line in iter(lambda: _refuse_long(path, file.readline(_one_more(most)), most), "") if line.strip()
        )
        first, second = next(lines, ""), next(lines, "")
    value = None
    with suppress(ValueError):
        value = parse_json(first)
    with open_text(path) as file:
        if first.startswith("[") and (".json" in path.suffixes or value is None or not second):
            yield from _array(path, _refuse_long(path, file.read(_one_more(most)), most))
        elif first.startswith("{") and (value is None or (not second and (_rows_key(value) or _columnwise(value)))):
            yield from _objects(path, _refuse_long(path, file.read(_one_more(most)), most), report)
        else:
            yield from _lines(path, file)


def _one_more(most: int | None) -> int:
    """How many characters to read so as to notice that there are too many; all, if there is no limit."""
    return -1 if most is None else most + 1


def _refuse_long(path: Path, text: str, most: int | None) -> str:
    if most is not None and len(text) > most:
        raise DataError(
            f"data: {path} is read whole, because it has no row a line, or its first one is very long, and has more than {most:,} characters: "
            "write it as JSON Lines, an object a line."
        )
    return text


def _lines(path: Path, lines: Iterable[str]) -> Iterator[RawRow | RejectedExample]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path}:{number}"
            try:
                yield row_of(where, parse_json(line.rstrip("\n")))
            except ValueError as error:
                yield RejectedExample(where, f"not valid JSON: {error}")


def _objects(path: Path, text: str, report: SourceReport) -> Iterator[RawRow | RejectedExample]:
    """Objects one after the other that take several lines each; or the only one, which holds the array of rows."""
    place, at = _places(path, text), after_space(text, 0)
    try:
        value, end = value_at(text, at)
    except ValueError:
        end = at
    after = after_space(text, end)
    if "\n" not in text[at:end] and after < len(text):
        yield from _lines(path, io.StringIO(text))  # the first line is broken; the others may not be
        return
    if after == len(text):
        if (key := _rows_key(value)) is not None:
            report.ignored_columns |= value.keys() - {key}
            yield from _array(path, text, _start_of(key, text, at))
            return
        if reason := _columnwise(value):
            yield RejectedExample(place(at), reason)
            return
    while True:
        yield row_of(place(at), value)
        at = after_space(text, end)
        if at == len(text):
            return
        try:
            value, end = value_at(text, at)
        except ValueError as error:
            yield RejectedExample(place(at), f"not valid JSON: {error}; nothing after it can be read")
            return


def _rows_key(value: Any) -> str | None:
    """The key under which an object holds all rows: its only list of objects, which are no messages; None if it is a row itself."""
    if not isinstance(value, dict) or COLUMNS & value.keys():
        return None
    lists = [
        key for key, inner in value.items() if isinstance(inner, list) and inner and all(isinstance(o, dict) for o in inner)
    ]
    if len(lists) != 1 or any({"role", "from"} & row.keys() for row in value[lists[0]]):
        return None
    return lists[0]


def _columnwise(value: Any) -> str | None:
    """What to do about a table that is written column by column."""
    columns = list(value.values()) if isinstance(value, dict) else []
    if len(columns) > 1 and all(isinstance(cells, dict) and cells.keys() == columns[0].keys() != set() for cells in columns):
        return "a table by columns, as pandas writes it: write it by rows, with to_json(path, orient='records', lines=True)"
    alike = len(columns) > 1 and all(isinstance(cells, list) and len(cells) == len(columns[0]) > 0 for cells in columns)
    if alike and not any(isinstance(cell, dict) for cells in columns for cell in cells):
        return "a table by columns: write it by rows, as a JSON array of objects, or an object a line"
    return None


def _start_of(key: str, text: str, at: int) -> int:
    """Where the value of a key starts in the object that starts at `at`."""
    at = after_space(text, at + 1)
    while True:
        name, end = value_at(text, at)
        start = after_space(text, after_space(text, end) + 1)  # behind the colon
        if name == key:
            return start
        at = after_space(text, after_space(text, value_at(text, start)[1]) + 1)  # behind the comma


def _places(path: Path, text: str) -> Callable[[int], str]:
    """A function from a character's index to file:line; with the column, if the index asked for before is in the same line."""
    breaks = [-1, *(match.start() for match in re.finditer("\n", text))]
    last = 0

    def place(at: int) -> str:
        nonlocal last
        line, before = bisect_left(breaks, at), last
        last = line
        return f"{path}:{line}" if line != before else f"{path}:{line}:{at - breaks[line - 1]}"

    return place


def _array(path: Path, text: str, at: int | None = None) -> Iterator[RawRow | RejectedExample]:
    """The rows of the array that starts there; unless given, the file is one array."""
    place, is_file = _places(path, text), at is None
    at = after_space(text, (text.index("[") if at is None else at) + 1)
    more = text[at : at + 1] != "]"
    while more:
        where = place(at)
        try:
            value, end = value_at(text, at)
            yield row_of(where, value)
        except ValueError as error:
            after = end_of(text, at)
            yield RejectedExample(
                where, f"not valid JSON: {error}" + ("; nothing after it can be read" if after is None else "")
            )
            if after is None:
                return
            end = after
        at = after_space(text, end)
        if text[at : at + 1] not in (",", "]"):
            reason = f"not valid JSON: expected ',' or ']' after a row{place_in(text, end)}; nothing after it can be read"
            yield RejectedExample(place(end), reason)
            return
        more = text[at] == ","
        if more:
            at = after_space(text, at + 1)
    rest = after_space(text, at + 1)
    if is_file and rest < len(text):
        yield RejectedExample(place(rest), "text follows the end of the JSON array; it was not read")
