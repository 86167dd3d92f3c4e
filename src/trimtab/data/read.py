"""Sources of rows: files, folders, patterns of files and datasets on the hub. Every row has the file and line it is in."""

import difflib
import glob
import re
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from trimtab.core.errors import DataError, listing
from trimtab.core.files import expand_user
from trimtab.data.arrow_files import hub_dataset, is_saved_dataset, numbered, parquet, saved_dataset
from trimtab.data.example import RawRow, RejectedExample, SourceReport
from trimtab.data.json_files import json_file
from trimtab.data.order import sampled
from trimtab.data.source import Objects, Source
from trimtab.data.text_files import COMPRESSED, PLAIN, csv_file, not_utf8, plain_file

TABLES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
"""Endings of files that hold rows with columns."""
SUFFIXES = (*TABLES, *PLAIN)
LONGEST = 1 << 26
"""Characters of the longest document of a corpus, and of the longest file of one that can't be read piece by piece."""
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+(:\w+)?")
_SPLITS = re.compile(r"(?<![a-z])(train|training|test|testing|valid|validation|dev|val|eval|evaluation)(?![a-z])")
_METADATA = {"dataset_infos.json", "dataset_info.json", "config.json", "metadata.json", "package.json"}
"""Files of a folder that describe its rows."""
_ABOUT = re.compile(r"(readme|licen[cs]e|copying|notice|changelog|citation|requirements)[^/]*", re.IGNORECASE)
"""Names of text files that say something about the tables beside them."""


def read_rows(
    source: Source | Objects, report: SourceReport | None = None, seed: int | None = 0, *, most: int | None = None
) -> Iterator[RawRow | RejectedExample]:
    """Every row of a source, or the sample that its limit allows, in the source's order; one that can't be read is a RejectedExample.

    Args:
        source: Its path is a file (JSON, JSONL, CSV, TSV, Parquet, plain text; all but Parquet also as .gz or .zst), a pattern of
            files such as `data/*.jsonl`, a folder of such files or one that `datasets` saved, or a dataset on the hub (`org/name` or
            `org/name:split`; the split is `train` unless given).
        report: Counts what is left out while reading.
        seed: Decides the sample; None for every row.
        most: The most characters of what can't be read piece by piece: a document, or a JSON file without a row a line. With it, a
            dataset on the hub is read as a stream, and of a limited source the first rows.

    Raises:
        DataError: There is no such source, it holds no rows, or it can't be read at all.
        StorageError: It could not be fetched from the hub.
    """
    report = report or SourceReport((source.path,))
    path, limit = expand_user(source.path), source.limit if seed is not None and most is None else None
    if isinstance(source, Objects):
        rows = numbered(source.rows, lambda n: f"{source.path}[{n}]", report, limit, seed or 0)
    elif (dataset := _dataset(source, stream=most is not None)) is not None:
        rows = numbered(dataset, lambda n: f"{source.path}:{n + 1}", report, limit, seed or 0)
    elif files := _files(source.path):
        _refuse_parts(source, files[0])
        rows = chain.from_iterable(_read_file(file, report, most) for file in files)
        rows = iter(sampled(rows, limit, seed or 0)) if limit is not None else rows
    else:
        raise DataError(f"data: {source.path}: no such file or folder (looked in {Path.cwd()}{_near(path)}).")
    empty = True
    for row in rows if most is None else islice(rows, source.limit):
        empty = False
        yield row
    if empty:
        raise DataError(f"data: {source.path} holds no examples.")


def _dataset(source: Source, *, stream: bool) -> Any:
    """What `datasets` reads of a source, at once or while it is gone through; None if that is files, or nothing."""
    path = expand_user(source.path)
    if path.is_dir() and is_saved_dataset(path):
        return saved_dataset(path, source)
    if path.is_dir() and (source.subset or source.split) and source.revision is None:
        return hub_dataset(str(path), source.subset, source.split, stream=stream)
    if not _files(source.path) and _on_hub(source.path):
        name, _, split = source.path.partition(":")
        if split and source.split:
            raise DataError(f"data: {source.path} names the split {split}, and split: {source.split} another: leave one out.")
        return hub_dataset(name, source.subset, source.split or split, source.revision, stream=stream)
    return None


def _refuse_parts(source: Source, file: Path) -> None:
    """Raise DataError for settings of a dataset that files don't have."""
    for key in ("subset", "split", "revision"):
        if getattr(source, key) is not None:
            raise DataError(
                f"data: {source.path}: {key} chooses a part of a dataset on the hub or of a folder, and {file} is a file: leave {key} out."
            )


def _near(path: Path) -> str:
    """A suggestion: the file or folder beside it whose name is most similar, if one is."""
    neighbours = {file.stem: file for file in sorted(path.parent.iterdir())} if path.parent.is_dir() else {}
    close = difflib.get_close_matches(path.stem, neighbours, n=1, cutoff=0.7)
    return f"; did you mean {neighbours[close[0]]}?" if close else ""


def local_files(source: str) -> list[Path]:
    """The files that a source consists of; none for one on the hub. Raises DataError as `read_rows` does."""
    path = expand_user(source)
    if path.is_dir() and is_saved_dataset(path):
        return sorted(file for file in path.rglob("*") if file.is_file())
    return _files(source)


def reads_files(source: Source) -> bool:
    """Whether a source is files that are read one by one, rather than a dataset. Raises DataError if there is nothing of that name."""
    path = expand_user(source.path)
    if path.is_dir() and (is_saved_dataset(path) or source.subset or source.split):
        return False
    if files := _files(source.path):
        _refuse_parts(source, files[0])
        return True
    if not _on_hub(source.path):
        raise DataError(f"data: {source.path}: no such file or folder (looked in {Path.cwd()}{_near(path)}).")
    return False


def is_local(source: str) -> bool:
    """Whether it is no dataset on the hub. It need not exist."""
    return bool(_matching(source)) or expand_user(source).exists() or not _on_hub(source)


def _on_hub(source: str) -> bool:
    path = expand_user(source)
    return bool(_HUB_NAME.fullmatch(source)) and _suffix(path) not in SUFFIXES and not Path(path.parts[0]).is_dir()


def absolute_source(source: str) -> str:
    """The source with an absolute path; a hub name as it is."""
    path = expand_user(source)
    return str(path.absolute()) if path.exists() or _matching(source) else source


def _matching(source: str) -> list[str]:
    """The paths that match a pattern."""
    return glob.glob(str(expand_user(source)), recursive=True) if glob.has_magic(source) else []


def _files(source: str) -> list[Path]:
    path = expand_user(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        return _folder_files(path)
    return [file for file in sorted(map(Path, _matching(source))) if file.is_file()]


def _all_files(folder: Path) -> list[Path]:
    """The data files of a folder. Raises DataError if it has none."""
    visible = (p for p in sorted(folder.rglob("*")) if not any(part.startswith(".") for part in p.relative_to(folder).parts))
    files = [p for p in visible if p.is_file() and _suffix(p) in SUFFIXES and p.name not in _METADATA]
    if any(_suffix(p) in TABLES for p in files):
        files = [p for p in files if _suffix(p) in TABLES or not _ABOUT.fullmatch(p.name)]
    if not files:
        raise DataError(f"data: {folder} holds no data file ({', '.join(SUFFIXES)}), and is no folder that `datasets` saved.")
    return files


def _folder_files(folder: Path) -> list[Path]:
    """The files of a folder, which have to be shards of one data set."""
    files = _all_files(folder)
    for differing, kind_of in (("kinds of files", _kind), ("splits", lambda file: _split(file.relative_to(folder)))):
        kinds = {kind_of(file): file for file in files if kind_of(file)}
        if len(kinds) > 1:
            settings = [f"data.train='{_pattern(file, folder)}'" for _, file in sorted(kinds.items())]
            raise DataError(
                f"data: {folder} holds several {differing} ({', '.join(sorted(kinds))}). Choose one, for example:\n{listing(settings)}"
            )
    return files


def splits(path: str) -> dict[str, str]:
    """The splits of a folder's files, or of the files beside one that is called train: name of the split -> its source."""
    file = expand_user(path)
    if file.is_file():
        own = _split(Path(file.name))
        beside = [other for other in sorted(file.parent.iterdir()) if other.is_file()] if own.startswith("train") else []
        alike = file.name.lower().replace(own, "", 1)
        found = {split: other for other in beside if (split := _split(Path(other.name))) and _suffix(other) == _suffix(file)}
        return {split: str(other) for split, other in found.items() if other.name.lower().replace(split, "", 1) == alike}
    if not file.is_dir() or is_saved_dataset(file):
        return {}
    named = {_split(other.relative_to(file)): other for other in _all_files(file)}
    return {split: _pattern(other, file) for split, other in named.items()} if len(named) > 1 and "" not in named else {}


def _kind(file: Path) -> str:
    """Files of one kind may be read together: documents of several endings, but not different tables."""
    return "plain text" if _suffix(file) in PLAIN else _suffix(file)


def _split(file: Path) -> str:
    """The split that the name of a file or its folder says; empty if none. The name of a document says what it is about."""
    splits = _SPLITS.findall(str(file.parent if _suffix(file) in PLAIN else file).lower())
    return splits[-1] if splits else ""


def _pattern(file: Path, folder: Path) -> str:
    """A pattern that matches a file and the others of its split."""
    split, ending = _split(Path(file.name)), "".join(file.suffixes[-2:] if file.suffix in COMPRESSED else file.suffixes[-1:])
    parent = f"{folder}/**" if _suffix(file) in PLAIN and not split else file.parent
    return f"{parent}/*{f'{split}*' if split else ''}{ending}"


def _suffix(path: Path) -> str:
    """A file's ending, without that of compression."""
    return Path(path.stem if path.suffix.lower() in COMPRESSED else path.name).suffix.lower()


def _read_file(path: Path, report: SourceReport, most: int | None) -> Iterator[RawRow | RejectedExample]:
    suffix = _suffix(path)
    if suffix not in SUFFIXES or (suffix == ".parquet" and path.suffix.lower() in COMPRESSED):
        raise DataError(f"data: {path}: the ending {path.suffix!r} is not one of {', '.join(SUFFIXES)}{_advice(path)}.")
    if path.stat().st_size == 0 and suffix not in PLAIN:  # an empty document is an example that can't be used
        raise DataError(f"data: {path} is empty.")
    try:
        if suffix in (".csv", ".tsv"):
            yield from csv_file(path, "\t" if suffix == ".tsv" else None)
        elif suffix == ".parquet":
            yield from parquet(path, report)
        elif suffix in PLAIN:
            yield from plain_file(path, most)
        else:
            yield from json_file(path, report, most)
    except UnicodeError:
        raise DataError(not_utf8(path)) from None
    except (OSError, EOFError) as error:
        raise DataError(f"data: {path} cannot be read: {getattr(error, 'strerror', None) or error}.") from None


def _advice(path: Path) -> str:
    known = {
        ".xlsx": "CSV",
        ".xls": "CSV",
        ".ods": "CSV",
        ".arrow": "Parquet, or give the folder that `datasets` saved",
        ".zip": ".gz",
    }
    return f": save it as {known[path.suffix.lower()]}" if path.suffix.lower() in known else ""
