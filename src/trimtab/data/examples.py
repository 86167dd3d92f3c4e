"""Examples as they are read from the sources that a recipe names."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from typing import Any

from trimtab.core.errors import DataError, listing
from trimtab.core.files import expand_user, sha256_file
from trimtab.data.config import DataConfig
from trimtab.data.example import Column, Example, Kind, SourceReport
from trimtab.data.formats import read_examples
from trimtab.data.preference_formats import FORMATS
from trimtab.data.read import LONGEST, is_local, local_files, read_rows
from trimtab.data.source import Objects, Source
from trimtab.data.system_message import SystemMessage

FIRST = 20
"""Examples that are checked before anything else."""
Named = tuple[str, Sequence[Source | Objects]]
"""Sources that are reported together under a name, which is empty for those of a list."""


def load_examples(
    sources: tuple[str, ...] | str,
    columns: Mapping[Column, str] | None = None,
    kind: Kind = "answers",
    **reading: Any,
) -> tuple[list[Example], SourceReport]:
    """Every usable example of one or more sources. See `data.read.read_rows` for what a source can be.

    Args:
        reading: The other keys of `data` that decide how a row is read, such as `ignore` and `system`.
    """
    config = DataConfig(train=sources, columns=dict(columns or {}), **reading)
    (named,) = config.train_sources.items()
    report = report_of(named)
    return list(examples_of(named, config, kind, 0, report)), report


def report_of(named: Named) -> SourceReport:
    name, sources = named
    return SourceReport(tuple(source.path for source in sources), name)


def examples_of(
    named: Named,
    config: DataConfig,
    kind: Kind,
    seed: int,
    report: SourceReport | None = None,
    first: int | None = None,
) -> Iterator[Example]:
    """The usable examples of a named source, read lazily, from its first so many rows; the report is filled meanwhile."""
    name, sources = named
    report = report or report_of(named)
    for source in sources:
        own = config.of(source)
        rows = read_rows(source, report, seed if first is None else None, most=LONGEST if config.corpus else None)
        system = SystemMessage(own.system, own.drop_system)
        arguments = own.columns, report, FORMATS[kind], own.ignore, own.templates, system, own.train_on
        read = read_examples(islice(rows, first), *arguments)
        for example in read:
            yield replace(example, source=name) if name else example


def first_examples(config: DataConfig, count: int, seed: int, kind: Kind = "answers") -> list[Example]:
    """The first so many usable training examples of each source, and as many for validation."""
    return [
        example
        for named in (*config.train_sources.items(), *config.eval_sources.items())
        for example in islice(examples_of(named, config, kind, seed), count)
    ]


def check_first_examples(config: DataConfig, kind: Kind = "answers") -> None:
    """Read the first examples of every local source, before anything that takes longer.

    Raises:
        DataError: None of a source can be used, or two sources are the same.
    """
    _refuse_same(config)
    for name, sources in (*config.train_sources.items(), *config.eval_sources.items()):
        for source in sources:
            if not is_local(source.path):
                continue
            report = SourceReport((source.path,), name)
            usable = next(examples_of((name, (source,)), config, kind, 0, report, FIRST), None)
            if usable is None and config.bad_rows == "stop":
                raise DataError(
                    f"data: none of the first {len(report.rejected)} examples of {report.name} can be used:\n{reasons(report)}"
                )


def _refuse_same(config: DataConfig) -> None:
    """Raise DataError for named training sources that read the same examples in the same way."""
    named = config.train if isinstance(config.train, dict) else {}
    first: dict[Any, str] = {}
    for name, source in named.items():
        read = (source.subset, source.split, source.revision, str(config.of(source).reading))
        for path in [*map(str, local_files(source.path))] or [source.path]:
            if (other := first.setdefault((path, read), name)) != name:
                raise DataError(
                    f"data.train: {other} and {name} both read {path}, so its examples would be there twice. Give it once; "
                    "to have its examples more often, give it a greater weight."
                )


def held_out_examples(config: DataConfig, stored: dict[str, Any], kind: Kind = "answers") -> list[Example]:
    """The validation examples of a run, read again from its data config and what `LoadedData.plain` stored.

    Raises:
        DataError: A file has changed since, so its validation examples are not known.
    """
    for name, digest in stored["files"].items():
        path = expand_user(name)
        if not path.is_file() or sha256_file(path) != digest:
            raise DataError(
                f"data: {name} has changed since the run or is gone, so its validation examples are not known. Give examples with --data."
            )
    sources = config.eval_sources or config.train_sources
    if config.eval_sources:
        config = config.model_copy(update={"corpus": False})
    examples = chain.from_iterable(examples_of(named, config, kind, stored["seed"]) for named in sources.items())
    held_out = set(stored["held_out"])
    chosen = [example for example in examples if example.where in held_out]
    if config.duplicates == "remove":  # a file that is given twice has each of its places once
        chosen = list({(example.source, example.where): example for example in chosen}.values())
    return chosen


def reasons(report: SourceReport) -> str:
    """Why examples were rejected, a line each reason, with the first place that it holds for."""
    places: dict[str, list[str]] = {}
    for where, reason in report.rejected:
        places.setdefault(reason, []).append(where)
    return listing([f"{where}{f' and {len(more)} more' if more else ''}: {why}" for why, (where, *more) in places.items()])
