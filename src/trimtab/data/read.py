"""Data files, folders and hub datasets as rows: plain dicts, each with the file and line it stands in."""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trimtab.data.example import Refusal
from trimtab.errors import DataError, StorageError

Row = tuple[str, dict[str, Any]]
"""Where it stands (file:line), and its columns."""

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+(:\w+)?")


def read_rows(source: str) -> Iterator[Row | Refusal]:
    """Every row of a source, in its order; a row that can't be read is a Refusal.

    Args:
        source: A file (JSON, JSONL, CSV, TSV, Parquet), a folder that `datasets` saved, or a dataset on the hub
            (`org/name` or `org/name:split`; the split is `train` unless given).

    Raises:
        DataError: There is no such source, it is empty, or it can't be read at all.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        yield from _saved_dataset(path)
    elif path.is_file():
        yield from _file(path)
    elif _HUB_NAME.fullmatch(source) and path.suffix not in SUFFIXES and not Path(path.parts[0]).is_dir():
        yield from _hub_dataset(source)
    else:
        raise DataError(f"data: {source}: no such file or folder (looked in {Path.cwd()}).")


def _file(path: Path) -> Iterator[Row | Refusal]:
    if path.stat().st_size == 0:
        raise DataError(f"data: {path} is empty.")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"data: {path}: the ending {suffix!r} is not one of {', '.join(SUFFIXES)}.")
    try:
        if suffix in (".csv", ".tsv"):
            yield from _csv(path, "\t" if suffix == ".tsv" else ",")
        elif suffix == ".parquet":
            yield from _parquet(path)
        elif suffix == ".json" and _starts_with_bracket(path):
            yield from _json_array(path)
        else:
            yield from _json_lines(path)
    except UnicodeDecodeError as error:
        raise DataError(f"data: {path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}. Convert it to UTF-8.") from None
    except OSError as error:
        raise DataError(f"data: {path} cannot be read: {error.strerror or error}.") from None


def _starts_with_bracket(path: Path) -> bool:
    with open(path, encoding="utf-8-sig") as file:
        return next((line.lstrip()[0] for line in file if line.strip()), "") == "["


def _json_lines(path: Path) -> Iterator[Row | Refusal]:
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path}:{number}"
                try:
                    yield _row(where, json.loads(line, parse_constant=_refuse_constant))
                except ValueError as error:
                    yield Refusal(where, f"not valid JSON: {_json_words(error)}")


def _json_array(path: Path) -> Iterator[Row | Refusal]:
    text = path.read_text(encoding="utf-8-sig")
    decoder = json.JSONDecoder(parse_constant=_refuse_constant)
    space = re.compile(r"\s*")

    def after_space(at: int) -> int:
        found = space.match(text, at)
        return found.end() if found else at

    at, line, counted = after_space(text.index("[") + 1), 1, 0
    while True:
        line, counted = line + text.count("\n", counted, at), at
        where = f"{path}:{line}"
        if text[at : at + 1] == "]":
            if text[at + 1 :].strip():
                yield Refusal(where, "text follows the end of the JSON array")
            return
        try:
            value, at = decoder.raw_decode(text, at)
        except ValueError as error:
            # Where the next row starts cannot be known, so nothing after a broken one can be read.
            yield Refusal(where, f"not valid JSON: {_json_words(error)}; nothing after it can be read")
            return
        yield _row(where, value)
        at = after_space(at)
        if text[at : at + 1] == ",":
            at = after_space(at + 1)
        elif text[at : at + 1] != "]":
            yield Refusal(where, "not valid JSON: expected ',' or ']' after this row; nothing after it can be read")
            return


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


def _json_words(error: ValueError) -> str:
    return f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)


def _csv(path: Path, delimiter: str) -> Iterator[Row | Refusal]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter, strict=True, restkey="")
        start = 2
        while True:
            try:
                row = next(reader, None)
            except csv.Error as error:
                yield Refusal(f"{path}:{start}", f"not valid CSV: {error}; nothing after it can be read")
                return
            if row is None:
                return
            where, start = f"{path}:{start}", reader.line_num + 1
            if "" in row or None in row.values():
                yield Refusal(where, f"does not have the {len(reader.fieldnames or ())} columns that the first line names")
            else:
                yield where, row


def _parquet(path: Path) -> Iterator[Row | Refusal]:
    import pyarrow.lib
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for value in batch.to_pylist():
                    number += 1
                    yield _row(f"{path}:{number}", value)
    except pyarrow.lib.ArrowInvalid as error:
        raise DataError(f"data: {path} is not a Parquet file: {error}") from None


def _saved_dataset(path: Path) -> Iterator[Row | Refusal]:
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
    except (FileNotFoundError, ValueError) as error:
        raise DataError(f"data: {path} is not a folder that `datasets` saved: {error}") from None
    if isinstance(found, datasets.DatasetDict):
        if "train" not in found:
            raise DataError(f"data: {path} has the splits {', '.join(found)}; give one, for example {path}/{next(iter(found))}.")
        found = found["train"]
    for number, value in enumerate(found, start=1):
        yield _row(f"{path}:{number}", value)


def _hub_dataset(name: str) -> Iterator[Row | Refusal]:
    import datasets

    repository, _, split = name.partition(":")
    try:
        found = datasets.load_dataset(repository, split=split or "train")
    except Exception as error:  # whatever the network, the hub and the dataset's own layout can raise
        raise StorageError(
            f"data: {name} is no local file or folder, and it could not be fetched from the hub: {str(error).splitlines()[0]}"
        ) from error
    for number, value in enumerate(found, start=1):
        yield _row(f"{name}:{number}", value)  # pyright: ignore[reportArgumentType]


def _row(where: str, value: Any) -> Row | Refusal:
    if not isinstance(value, dict):
        return Refusal(where, f"a row is an object with named columns, not {_kind(value)}")
    return where, value


def _kind(value: Any) -> str:
    names = {str: "a string", list: "a list", bool: "a true/false value", int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), type(value).__name__)
