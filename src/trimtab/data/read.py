"""Where rows come from: files, folders, patterns of files and datasets on the hub; each row with the file and line it stands in."""

import difflib
import glob
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from trimtab.core.errors import DataError, listing
from trimtab.core.files import expand_user
from trimtab.data.arrow_files import hub_dataset, is_saved_dataset, parquet, saved_dataset
from trimtab.data.example import Account, RawRow, Refusal
from trimtab.data.json_files import json_file
from trimtab.data.text_files import PACKED, csv_file, not_text

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+(:\w+)?")
_SPLITS = re.compile(r"(?<![a-z])(train|training|test|testing|valid|validation|dev|val|eval|evaluation)(?![a-z])")
_ABOUT = {"dataset_infos.json", "dataset_info.json", "config.json", "metadata.json", "package.json"}
"""Files of a folder that say something about its rows."""


def read_rows(source: str, account: Account | None = None) -> Iterator[RawRow | Refusal]:
    """Every row of a source, in its order; a row that can't be read is a Refusal.

    Args:
        source: A file (JSON, JSONL, CSV, TSV, Parquet; the text ones also as .gz or .zst), a pattern of files such as
            `data/*.jsonl`, a folder of such files or one that `datasets` saved, or a dataset on the hub (`org/name` or
            `org/name:split`; the split is `train` unless given).
        account: Is told what is left out on the way.

    Raises:
        DataError: There is no such source, it holds no rows, or it can't be read at all.
        StorageError: It could not be fetched from the hub.
    """
    account = account or Account((source,))
    path = expand_user(source)
    if path.is_dir() and is_saved_dataset(path):
        rows = saved_dataset(path, account)
    elif files := _files(source):
        rows = chain.from_iterable(_file(file, account) for file in files)
    elif _on_hub(source):
        rows = hub_dataset(source, account)
    else:
        raise DataError(f"data: {source}: no such file or folder (looked in {Path.cwd()}{_near(path)}).")
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise DataError(f"data: {source} holds no rows.")


def _near(path: Path) -> str:
    """What lies beside it that is called nearly so, if something is."""
    beside = {other.stem: other for other in sorted(path.parent.iterdir())} if path.parent.is_dir() else {}
    close = difflib.get_close_matches(path.stem, beside, n=1, cutoff=0.7)
    return f"; did you mean {beside[close[0]]}?" if close else ""


def local_files(source: str) -> list[Path]:
    """The files that a source consists of; none for one on the hub. Raises DataError as `read_rows` does."""
    path = expand_user(source)
    if path.is_dir() and is_saved_dataset(path):
        return sorted(file for file in path.rglob("*") if file.is_file())
    return _files(source)


def is_local(source: str) -> bool:
    """Whether it is not a dataset on the hub. It may not be there at all."""
    return bool(_matching(source)) or expand_user(source).exists() or not _on_hub(source)


def _on_hub(source: str) -> bool:
    path = expand_user(source)
    return bool(_HUB_NAME.fullmatch(source)) and _suffix(path) not in SUFFIXES and not Path(path.parts[0]).is_dir()


def absolute_source(source: str) -> str:
    """The same source from anywhere; a hub name as it is."""
    path = expand_user(source)
    return str(path.absolute()) if path.exists() or _matching(source) else source


def _matching(source: str) -> list[str]:
    """What a pattern of files stands for."""
    return glob.glob(str(expand_user(source)), recursive=True) if glob.has_magic(source) else []


def _files(source: str) -> list[Path]:
    path = expand_user(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        return _of_folder(path)
    return [file for file in sorted(map(Path, _matching(source))) if file.is_file()]


def _of_folder(folder: Path) -> list[Path]:
    """The files of a folder, if they are shards of one thing."""
    inside = (p for p in sorted(folder.rglob("*")) if not any(part.startswith(".") for part in p.relative_to(folder).parts))
    files = [p for p in inside if p.is_file() and _suffix(p) in SUFFIXES and p.name not in _ABOUT]
    if not files:
        raise DataError(
            f"data: {folder} holds no file of rows ({', '.join(SUFFIXES)}), and is no folder that `datasets` saved."
        )
    for what, of in (("kinds of files", _suffix), ("splits", lambda file: _split(file.relative_to(folder)))):
        kinds = {of(file): file for file in files if of(file)}
        if len(kinds) > 1:
            ways = [f"data.train='{_pattern(file, folder)}'" for _, file in sorted(kinds.items())]
            raise DataError(
                f"data: {folder} holds several {what} ({', '.join(sorted(kinds))}). Say which, for example:\n{listing(ways)}"
            )
    return files


def _split(file: Path) -> str:
    """The split that a file's name, or its folder's, says it belongs to."""
    found = _SPLITS.findall(str(file).lower())
    return found[-1] if found else ""


def _pattern(file: Path, folder: Path) -> str:
    """A pattern for a file and what belongs to it."""
    split, ending = _split(Path(file.name)), "".join(file.suffixes[-2:] if file.suffix in PACKED else file.suffixes[-1:])
    return f"{file.parent}/*{f'{split}*' if split else ''}{ending}"


def _suffix(path: Path) -> str:
    """A file's ending, but for a packed one's `.gz`."""
    return Path(path.stem if path.suffix.lower() in PACKED else path.name).suffix.lower()


def _file(path: Path, account: Account) -> Iterator[RawRow | Refusal]:
    suffix = _suffix(path)
    if suffix not in SUFFIXES or (suffix == ".parquet" and path.suffix.lower() in PACKED):
        raise DataError(f"data: {path}: the ending {path.suffix!r} is not one of {', '.join(SUFFIXES)}{_advice(path)}.")
    if path.stat().st_size == 0:
        raise DataError(f"data: {path} is empty.")
    try:
        if suffix in (".csv", ".tsv"):
            yield from csv_file(path, "\t" if suffix == ".tsv" else None)
        elif suffix == ".parquet":
            yield from parquet(path, account)
        else:
            yield from json_file(path, account)
    except UnicodeError:
        raise DataError(not_text(path)) from None
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
