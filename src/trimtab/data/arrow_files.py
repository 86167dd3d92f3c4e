"""Rows that Arrow stores: Parquet files, folders that `datasets` saved, datasets on the hub; without the nulls that Arrow adds.

All objects of an Arrow column have the same keys: one that lacks a key has a null there. Tools and the arguments of calls
would be rendered with these nulls, and trained on.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from trimtab.core.errors import DataError, StorageError
from trimtab.data.example import RawRow, RejectedExample, SourceReport
from trimtab.data.order import sampled
from trimtab.data.source import Source
from trimtab.data.strict_json import row_of
from trimtab.data.text_files import refuse_repeated


def parquet(path: Path, report: SourceReport) -> Iterator[RawRow | RejectedExample]:
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except Exception as error:  # Arrow raises a dozen kinds
        raise DataError(f"data: {path} is not a Parquet file: {_first_line(error)}") from None
    with file:
        refuse_repeated(file.schema_arrow.names, str(path))
        rows = (row for batch in file.iter_batches(batch_size=1024) for row in batch.to_pylist())
        yield from numbered(rows, lambda n: f"{path}:{n + 1}", report)


def is_saved_dataset(path: Path) -> bool:
    return any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))


def saved_dataset(path: Path, source: Source) -> Any:
    """A dataset that `datasets` saved in a folder, or one of several splits."""
    import datasets

    try:
        dataset = datasets.load_from_disk(str(path))
    except Exception as error:  # a damaged folder raises many kinds
        raise DataError(f"data: {path} is not a folder that `datasets` saved: {_first_line(error)}") from None
    for key in ("subset", "revision"):
        if getattr(source, key) is not None:
            raise DataError(f"data: {path} is a folder that `datasets` saved, which has no {key}: leave it out.")
    if not isinstance(dataset, datasets.DatasetDict):
        if source.split is not None:
            raise DataError(f"data: {path} has a single split: leave split ({source.split}) out.")
        return dataset
    split = source.split or "train"
    if split not in dataset:
        lacking = f"has no split {split}, but" if source.split else "has the splits"
        raise DataError(f"data: {path} {lacking} {', '.join(dataset)}; give one, for example {path}/{next(iter(dataset))}.")
    return dataset[split]


def hub_dataset(
    name: str, subset: str | None = None, split: str | None = None, revision: str | None = None, *, stream: bool = False
) -> Any:
    """A split of a dataset on the hub, or of a folder with the files of one; as a stream, nothing of it is stored.

    Raises:
        DataError: It has no such subset or split; the message has those that there are.
        StorageError: It could not be fetched.
    """
    import datasets

    try:
        settings = {"streaming": True} if stream else {}
        return datasets.load_dataset(
            name, subset, split=split or "train", revision=revision, trust_remote_code=False, **settings
        )
    except Exception as error:  # the network, the hub and the dataset's layout raise many kinds
        message = _first_line(error)
        if isinstance(error, ValueError) and any(words in message for words in _NO_SUCH_PART):
            whole = " ".join(str(error).split())
            raise DataError(f"data: {name}: {whole} (They are the source's keys subset and split.)") from None
        if Path(name).is_dir():
            raise DataError(f"data: {name} cannot be read as a dataset: {message}") from None
        raise StorageError(
            f"data: {name} is no local file or folder, and it could not be fetched from the hub: {message}"
        ) from error


_NO_SUCH_PART = ("Unknown split", "BuilderConfig", "Config name is missing")
"""How errors of `datasets` begin that list the subsets or splits that there are."""


def numbered(
    rows: Any, place: Callable[[int], str], report: SourceReport, limit: int | None = None, seed: int = 0
) -> Iterator[RawRow | RejectedExample]:
    """The rows of a dataset, a list or a stream, or a random sample of them; of a stream, which may be endless, the first ones.

    Args:
        place: The place of a row, by its index.
    """
    indices: Iterable[int] = itertools.count()
    if limit is not None and hasattr(rows, "__len__"):
        indices = sampled(range(len(rows)), limit, seed)
        rows = rows.select(indices) if hasattr(rows, "select") else [rows[n] for n in indices]
    n = -1
    try:
        for n, row in itertools.islice(zip(indices, rows, strict=False), limit):
            if isinstance(row, dict):
                row, removed = without_padding(row)
                report.removed_nulls += removed
            yield row_of(place(n), row)
    except Exception as error:  # damage, or a value without a type in Python
        raise DataError(f"data: {place(n + 1)} cannot be read: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def without_padding(row: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """A row without the null keys of its objects, and how many those were; the row's own columns stay.

    An argument of a call stays null where the description of its tool requires it, or allows null.
    """
    nullable = dict(_nullable_arguments(list(row.values())))
    removed = 0

    def pruned(value: Any, kept: frozenset[str] = frozenset()) -> Any:
        nonlocal removed
        if isinstance(value, list):
            return [pruned(item) for item in value]
        if not isinstance(value, dict):
            return value
        present = {key: inner for key, inner in value.items() if inner is not None or key in kept}
        removed += len(value) - len(present)
        name = present.get("name")
        arguments = nullable.get(name, frozenset()) if isinstance(name, str) else frozenset()
        return {key: pruned(inner, arguments if key == "arguments" else frozenset()) for key, inner in present.items()}

    return {name: pruned(value) for name, value in row.items()}, removed


def _nullable_arguments(value: Any) -> Iterator[tuple[str, frozenset[str]]]:
    """The name of each tool that is described in a value, and its arguments that may be null on purpose."""
    if isinstance(value, list):
        for item in value:
            yield from _nullable_arguments(item)
    elif isinstance(value, dict):
        name, parameters = value.get("name"), value.get("parameters")
        if isinstance(name, str) and isinstance(parameters, dict):
            properties = parameters.get("properties") or {}
            nullable = {key for key, schema in properties.items() if isinstance(schema, dict) and "null" in _types(schema)}
            yield name, frozenset({*(parameters.get("required") or ()), *nullable})
        for inner in value.values():
            yield from _nullable_arguments(inner)


def _types(schema: dict[str, Any]) -> set[str]:
    types = [schema.get("type"), *(option.get("type") for option in schema.get("anyOf") or () if isinstance(option, dict))]
    return {name for kind in types for name in (kind if isinstance(kind, list) else [kind]) if isinstance(name, str)}
