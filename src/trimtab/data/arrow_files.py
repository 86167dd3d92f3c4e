"""Rows that Arrow holds: Parquet files, folders that `datasets` saved, datasets on the hub; without the nulls that Arrow adds.

In a column of Arrow's, all objects have the same keys: one that lacks a key has a null there. Tools and the arguments of calls
would be written with them, and learned.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from trimtab.core.errors import DataError, StorageError
from trimtab.data.example import Account, RawRow, Refusal
from trimtab.data.strict_json import row_of
from trimtab.data.text_files import refuse_twice


def parquet(path: Path, account: Account) -> Iterator[RawRow | Refusal]:
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except Exception as error:  # Arrow raises a dozen kinds
        raise DataError(f"data: {path} is not a Parquet file: {_first_line(error)}") from None
    with file:
        refuse_twice(file.schema_arrow.names, str(path))
        rows = (row for batch in file.iter_batches(batch_size=1024) for row in batch.to_pylist())
        yield from _numbered(str(path), rows, account)


def is_saved_dataset(path: Path) -> bool:
    return any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))


def saved_dataset(path: Path, account: Account) -> Iterator[RawRow | Refusal]:
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever a damaged folder can raise
        raise DataError(f"data: {path} is not a folder that `datasets` saved: {_first_line(error)}") from None
    if isinstance(found, datasets.DatasetDict):
        if "train" not in found:
            splits = ", ".join(found)
            raise DataError(f"data: {path} has the splits {splits}; give one, for example {path}/{next(iter(found))}.")
        found = found["train"]
    yield from _numbered(str(path), found, account)


def hub_dataset(name: str, account: Account) -> Iterator[RawRow | Refusal]:
    import datasets

    repository, _, split = name.partition(":")
    try:
        found = datasets.load_dataset(repository, split=split or "train", trust_remote_code=False)
    except Exception as error:  # whatever the network, the hub and the dataset's own layout can raise
        raise StorageError(
            f"data: {name} is no local file or folder, and it could not be fetched from the hub: {_first_line(error)}"
        ) from error
    yield from _numbered(name, found, account)


def _numbered(name: str, values: Iterable[Any], account: Account) -> Iterator[RawRow | Refusal]:
    number = 0
    try:
        for number, value in enumerate(values, start=1):
            if isinstance(value, dict):
                value, removed = without_padding(value)
                account.nulls += removed
            yield row_of(f"{name}:{number}", value)
    except Exception as error:  # damage, or a value that Python has no type for
        raise DataError(f"data: {name}: row {number + 1} cannot be read: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def without_padding(row: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """A row whose objects lack the keys that are null there, and how many those were; the row's own columns stay.

    An argument of a call stays null where the description of its tool requires it, or lets it be null.
    """
    meant = dict(_descriptions(list(row.values())))
    removed = 0

    def pruned(value: Any, kept: frozenset[str] = frozenset()) -> Any:
        nonlocal removed
        if isinstance(value, list):
            return [pruned(one) for one in value]
        if not isinstance(value, dict):
            return value
        there = {key: inner for key, inner in value.items() if inner is not None or key in kept}
        removed += len(value) - len(there)
        name = there.get("name")
        named = meant.get(name, frozenset()) if isinstance(name, str) else frozenset()
        return {key: pruned(inner, named if key == "arguments" else frozenset()) for key, inner in there.items()}

    return {name: pruned(value) for name, value in row.items()}, removed


def _descriptions(value: Any) -> Iterator[tuple[str, frozenset[str]]]:
    """Of each tool that is described in a value, its name and the arguments that may be null on purpose."""
    if isinstance(value, list):
        for one in value:
            yield from _descriptions(one)
    elif isinstance(value, dict):
        name, parameters = value.get("name"), value.get("parameters")
        if isinstance(name, str) and isinstance(parameters, dict):
            properties = parameters.get("properties") or {}
            nullable = {key for key, one in properties.items() if isinstance(one, dict) and "null" in _types(one)}
            yield name, frozenset({*(parameters.get("required") or ()), *nullable})
        for inner in value.values():
            yield from _descriptions(inner)


def _types(schema: dict[str, Any]) -> set[str]:
    several = [schema.get("type"), *(one.get("type") for one in schema.get("anyOf") or () if isinstance(one, dict))]
    return {name for one in several for name in (one if isinstance(one, list) else [one]) if isinstance(name, str)}
