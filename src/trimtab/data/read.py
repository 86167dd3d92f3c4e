"""Data files, folders and hub datasets as rows: plain dicts, each with the file and line it stands in."""

import csv
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from trimtab.data.example import Refusal
from trimtab.data.strict_json import after_space, end_of, parse_json, place_in, value_at
from trimtab.errors import DataError, StorageError
from trimtab.files import expanded

Row = tuple[str, dict[str, Any]]
"""Where it stands, and its columns. No two rows of a source stand at the same place: it is file:line, or file:line:column
where a JSON array has several rows on a line, or file:number where there are no lines."""

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+(:\w+)?")


def read_rows(source: str) -> Iterator[Row | Refusal]:
    """Every row of a source, in its order; a row that can't be read is a Refusal.

    Args:
        source: A file (JSON, JSONL, CSV, TSV, Parquet), a folder that `datasets` saved, or a dataset on the hub
            (`org/name` or `org/name:split`; the split is `train` unless given).

    Raises:
        DataError: There is no such source, it holds no rows, or it can't be read at all.
        StorageError: It could not be fetched from the hub.
    """
    path = expanded(source)
    if path.is_dir():
        rows = _saved_dataset(path)
    elif path.is_file():
        rows = _file(path)
    elif _HUB_NAME.fullmatch(source) and path.suffix.lower() not in SUFFIXES and not Path(path.parts[0]).is_dir():
        rows = _hub_dataset(source)
    else:
        raise DataError(f"data: {source}: no such file or folder (looked in {Path.cwd()}).")
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise DataError(f"data: {source} holds no rows.")


def _file(path: Path) -> Iterator[Row | Refusal]:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"data: {path}: the ending {suffix!r} is not one of {', '.join(SUFFIXES)}.")
    if path.stat().st_size == 0:
        raise DataError(f"data: {path} is empty.")
    try:
        if suffix in (".csv", ".tsv"):
            yield from _csv(path, "\t" if suffix == ".tsv" else ",")
        elif suffix == ".parquet":
            yield from _parquet(path)
        elif suffix == ".json" and _starts_with_bracket(path):
            yield from _json_array(path)
        else:
            yield from _json_lines(path)
    except UnicodeDecodeError:
        raise DataError(_not_text(path)) from None
    except OSError as error:
        raise DataError(f"data: {path} cannot be read: {error.strerror or error}.") from None


def _not_text(path: Path) -> str:
    """Where a file stops being UTF-8 (the error itself counts from the start of a buffer, not of the file)."""
    content = path.read_bytes()
    try:
        content.decode()
    except UnicodeDecodeError as error:
        line, wrong = len((content[: error.start] + b".").splitlines()), f"{content[error.start]:#04x}"
        return f"data: {path}:{line} is not UTF-8 text: byte {error.start:,} of the file is {wrong}. Convert it to UTF-8."
    return f"data: {path} changed while it was read."


# JSON


def _starts_with_bracket(path: Path) -> bool:
    with open(path, encoding="utf-8-sig") as file:
        return next((line.lstrip()[0] for line in file if line.strip()), "") == "["


def _json_lines(path: Path) -> Iterator[Row | Refusal]:
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path}:{number}"
                try:
                    yield _row(where, parse_json(line.rstrip("\n")))
                except ValueError as error:
                    yield Refusal(where, f"not valid JSON: {error}")


def _json_array(path: Path) -> Iterator[Row | Refusal]:
    text = path.read_text(encoding="utf-8-sig")
    breaks = [-1, *(found.start() for found in re.finditer("\n", text))]
    last = 0

    def place(at: int) -> str:
        """Its line; and its column, if something was in that line before."""
        nonlocal last
        line, before = bisect_left(breaks, at), last
        last = line
        return f"{path}:{line}" if line != before else f"{path}:{line}:{at - breaks[line - 1]}"

    at = after_space(text, text.index("[") + 1)
    more = text[at : at + 1] != "]"
    while more:
        where = place(at)
        try:
            value, end = value_at(text, at)
            yield _row(where, value)
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
    if rest < len(text):
        yield Refusal(place(rest), "text follows the end of the JSON array; it was not read")


# Tables


def _csv(path: Path, delimiter: str) -> Iterator[Row | Refusal]:
    csv.field_size_limit(2_147_483_647)  # a document may be longer than the 128 KiB that it allows unless told
    with open(path, encoding="utf-8-sig", newline="") as file:
        lines, start = csv.reader(file, delimiter=delimiter, strict=True), 1
        names: list[str] = []
        while True:
            try:
                cells = next(lines, None)
            except csv.Error as error:
                yield Refusal(f"{path}:{start}", f"not valid CSV: {error}; nothing after it can be read")
                return
            if cells is None:
                return
            where, start = f"{path}:{start}", lines.line_num + 1
            if not cells:
                continue  # a blank line
            if not names:
                names = cells
                _refuse_twice([name for name in names if name], where)
            elif len(cells) != len(names):
                yield Refusal(where, f"has {len(cells)} columns, and the first line names {len(names)}")
            else:
                yield where, dict(zip(names, cells, strict=True))


def _parquet(path: Path) -> Iterator[Row | Refusal]:
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except Exception as error:  # Arrow raises a dozen kinds
        raise DataError(f"data: {path} is not a Parquet file: {_first_line(error)}") from None
    with file:
        _refuse_twice(file.schema_arrow.names, str(path))
        yield from _numbered(str(path), (row for batch in file.iter_batches(batch_size=1024) for row in batch.to_pylist()))


def _refuse_twice(names: list[str], where: str) -> None:
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(f"data: {where} has two columns called {twice[0]!r}. Rename or remove one.")


# Datasets


def _saved_dataset(path: Path) -> Iterator[Row | Refusal]:
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever another folder, or a damaged one, can raise
        raise DataError(f"data: {path} is not a folder that `datasets` saved: {_first_line(error)}") from None
    if isinstance(found, datasets.DatasetDict):
        if "train" not in found:
            splits = ", ".join(found)
            raise DataError(f"data: {path} has the splits {splits}; give one, for example {path}/{next(iter(found))}.")
        found = found["train"]
    yield from _numbered(str(path), found)


def _hub_dataset(name: str) -> Iterator[Row | Refusal]:
    import datasets

    repository, _, split = name.partition(":")
    try:
        found = datasets.load_dataset(repository, split=split or "train", trust_remote_code=False)
    except Exception as error:  # whatever the network, the hub and the dataset's own layout can raise
        raise StorageError(
            f"data: {name} is no local file or folder, and it could not be fetched from the hub: {_first_line(error)}"
        ) from error
    yield from _numbered(name, found)


def _numbered(name: str, values: Iterable[Any]) -> Iterator[Row | Refusal]:
    number = 0
    try:
        for number, value in enumerate(values, start=1):
            yield _row(f"{name}:{number}", value)
    except Exception as error:  # damage, or a value that Python has no type for
        raise DataError(f"data: {name}: row {number + 1} cannot be read: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _row(where: str, value: Any) -> Row | Refusal:
    if not isinstance(value, dict):
        return Refusal(where, f"a row is an object with named columns, not {kind(value)}")
    return where, value


def kind(value: Any) -> str:
    """What a value is, in a reader's words."""
    numbers = dict.fromkeys((int, float), "a number")
    words = {str: "a string", list: "a list", dict: "an object", bool: "a true/false value", type(None): "null", **numbers}
    return words.get(type(value), type(value).__name__)
