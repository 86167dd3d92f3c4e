"""Text files, compressed or not, in UTF-8 or UTF-16: documents, and CSV tables."""

import csv
import gzip
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TextIO, cast

from trimtab.core.errors import DataError
from trimtab.data.example import RawRow, RejectedExample
from trimtab.data.strict_json import is_object

PLAIN = (".txt", ".md")
"""Endings of files whose whole content is text."""
SEPARATOR = re.compile(r"[ \t]*<\|endoftext\|>[ \t]*")
"""A line that separates documents in one file, as GPT-2's tools and TinyStories write it."""
COMPRESSED = (".gz", ".zst")
_DELIMITERS = (",", ";", "\t", "|")


def open_text(path: Path, newline: str | None = None) -> TextIO:
    """A text file, opened for reading. UTF-16 is recognized by its first two bytes."""
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


def not_utf8(path: Path) -> str:
    """A message that says where a file is not UTF-8 (a UnicodeError counts from the start of a buffer, not of the file)."""
    with _open_bytes(path) as file:
        content = file.read()
    try:
        content.decode()
    except UnicodeDecodeError as error:
        line, wrong = len((content[: error.start] + b".").splitlines()), f"{content[error.start]:#04x}"
        return f"data: {path}:{line} is not UTF-8 text: byte {error.start:,} of the file is {wrong}. Convert it to UTF-8."
    return f"data: {path} changed while it was read."


def plain_file(path: Path, most: int | None = None) -> Iterator[RawRow | RejectedExample]:
    """The documents of a plain-text file, without the line breaks at their ends: the whole file, or what its separators part.

    Args:
        most: The most characters of a document. Raises DataError for a longer one.
    """
    with open_text(path) as file:
        found = False
        for line, document, last in _documents(path, file, most):
            content = document.strip("\r\n")
            if line == 1 and is_object(content.partition("\n")[0]):
                raise DataError(f"data: {path} holds JSON objects, a line each, and not plain text: name it {path.stem}.jsonl.")
            line += document.count("\n", 0, len(document) - len(document.lstrip("\r\n")))
            if content.strip() or (last and not found):
                yield f"{path}:{line}", {"text": content}
            found = True


def _documents(path: Path, file: TextIO, most: int | None) -> Iterator[tuple[int, str, bool]]:
    """What stands between separators: the number of its first line, the text, and whether the file ends with it."""
    lines, first, length = list[str](), 1, 0
    for number, line in enumerate(file, start=1):
        if SEPARATOR.fullmatch(line.rstrip("\n")):
            yield first, "".join(lines), False
            lines, first, length = [], number + 1, 0
            continue
        lines.append(line)
        length += len(line)
        if most is not None and length > most:
            raise DataError(
                f"data: {path}:{first}: a document of more than {most:,} characters. Part documents with a line that says <|endoftext|>, or "
                "give each a file."
            )
    yield first, "".join(lines), True


def csv_file(path: Path, delimiter: str | None) -> Iterator[RawRow | RejectedExample]:
    """The rows of a table whose first line names its columns.

    Args:
        delimiter: What separates cells; found in the first line unless given.
    """
    csv.field_size_limit(2_147_483_647)  # a document may be longer than its default of 128 KiB
    with open_text(path, newline="") as file:
        head = next((line for line in file if line.strip()), "")
    delimiter = delimiter or _delimiter(head)
    with open_text(path, newline="") as file:
        lines = csv.reader(file, delimiter=delimiter, strict=True, skipinitialspace=_has_spaces(head, delimiter))
        start = 1
        names: list[str] = []
        while True:
            try:
                cells = next(lines, None)
            except csv.Error as error:
                yield RejectedExample(f"{path}:{start}", f"not valid CSV: {error}; nothing after it can be read")
                return
            if cells is None:
                return
            where, start = f"{path}:{start}", lines.line_num + 1
            if not cells:
                continue  # a blank line
            if not names:
                names = cells
                refuse_repeated([name for name in names if name], where)
            elif len(cells) != len(names):
                yield RejectedExample(where, f"has {len(cells)} columns, and the first line names {len(names)}")
            else:
                yield where, dict(zip(names, cells, strict=True))


def _delimiter(head: str) -> str:
    """A comma, unless the first line has none outside quotes and has another delimiter."""
    return next((mark for mark in _DELIMITERS if len(next(csv.reader([head], delimiter=mark), [])) > 1), ",")


def _has_spaces(head: str, delimiter: str) -> bool:
    """Whether every name but the first comes after a space: then that space belongs to the delimiter."""
    names = next(csv.reader([head], delimiter=delimiter), [])[1:]
    return bool(names) and all(name.startswith(" ") for name in names)


def refuse_repeated(names: list[str], where: str) -> None:
    """Raise DataError for two columns of one name."""
    if repeated := [name for name in names if names.count(name) > 1]:
        raise DataError(f"data: {where} has two columns called {repeated[0]!r}. Rename or remove one.")
