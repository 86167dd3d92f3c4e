"""Text files, packed or not, in UTF-8 or UTF-16; and tables in them."""

import csv
import gzip
import io
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TextIO, cast

from trimtab.core.errors import DataError
from trimtab.data.example import RawRow, Refusal

PACKED = (".gz", ".zst")
_DELIMITERS = (",", ";", "\t", "|")


def open_text(path: Path, newline: str | None = None) -> TextIO:
    """A text file to be read. One in UTF-16 says so by its first two bytes."""
    with _open_bytes(path) as file:
        start = file.read(2)
    encoding = "utf-16" if start in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    return io.TextIOWrapper(_open_bytes(path), encoding=encoding, newline=newline)


def _open_bytes(path: Path) -> BinaryIO:
    if path.suffix.lower() == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if path.suffix.lower() == ".zst":
        import pyarrow

        return cast(BinaryIO, pyarrow.input_stream(str(path), compression="zstd"))
    return open(path, "rb")


def not_text(path: Path) -> str:
    """Where a file stops being text (the error itself counts from the start of a buffer, not of the file)."""
    with _open_bytes(path) as file:
        content = file.read()
    try:
        content.decode()
    except UnicodeDecodeError as error:
        line, wrong = len((content[: error.start] + b".").splitlines()), f"{content[error.start]:#04x}"
        return f"data: {path}:{line} is not UTF-8 text: byte {error.start:,} of the file is {wrong}. Convert it to UTF-8."
    return f"data: {path} changed while it was read."


def csv_file(path: Path, delimiter: str | None) -> Iterator[RawRow | Refusal]:
    """The rows of a table whose first line names its columns.

    Args:
        delimiter: What stands between cells; unless given, what parts the first line.
    """
    csv.field_size_limit(2_147_483_647)  # a document may be longer than the 128 KiB that it allows unless told
    with open_text(path, newline="") as file:
        head = next((line for line in file if line.strip()), "")
    delimiter = delimiter or _delimiter(head)
    with open_text(path, newline="") as file:
        lines = csv.reader(file, delimiter=delimiter, strict=True, skipinitialspace=_spaced(head, delimiter))
        start = 1
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
                refuse_twice([name for name in names if name], where)
            elif len(cells) != len(names):
                yield Refusal(where, f"has {len(cells)} columns, and the first line names {len(names)}")
            else:
                yield where, dict(zip(names, cells, strict=True))


def _delimiter(head: str) -> str:
    """A comma, unless the first line holds none outside of quotes, and another delimiter."""
    return next((one for one in _DELIMITERS if len(next(csv.reader([head], delimiter=one), [])) > 1), ",")


def _spaced(head: str, delimiter: str) -> bool:
    """Whether every name but the first comes after a space: then that space belongs to the delimiter."""
    names = next(csv.reader([head], delimiter=delimiter), [])[1:]
    return bool(names) and all(name.startswith(" ") for name in names)


def refuse_twice(names: list[str], where: str) -> None:
    """Raise DataError for two columns of one name."""
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(f"data: {where} has two columns called {twice[0]!r}. Rename or remove one.")
