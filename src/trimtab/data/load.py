"""The data of a run: read, tokenized and split into training and validation, with a report of every example."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from trimtab.core.config import Config, as_tuple
from trimtab.core.errors import DataError, listing
from trimtab.core.files import expand_user, sha256_file
from trimtab.data.example import Column, Example, Kind, SourceReport, TokenRow
from trimtab.data.formats import read_examples
from trimtab.data.order import split
from trimtab.data.preference_formats import FORMATS
from trimtab.data.read import is_local, local_files, read_rows
from trimtab.data.rendering import Tokenizing
from trimtab.data.token_cache import TokenCache
from trimtab.data.token_rows import LengthLimit, tokenize_examples

FIRST = 20
"""Examples that are checked before anything else."""


def _count_or_fraction(raw: Any) -> Any:
    if isinstance(raw, float) and raw > 1 and raw % 1:
        raise ValueError(f"expected a fraction below 1 or a whole count, got {raw}.")
    return int(raw) if isinstance(raw, float) and raw >= 1 else raw


class DataConfig(Config):
    """What to train on."""

    train: Annotated[tuple[str, ...], Field(min_length=1), BeforeValidator(as_tuple)]
    """Files (JSON, JSONL, CSV, TSV, Parquet), patterns such as data/*.jsonl, folders, or datasets on the hub; several are joined."""
    eval: Annotated[str | Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0)], BeforeValidator(_count_or_fraction)] = (
        0.05
    )
    """Validation examples: another file, a fraction of the training examples (below 1), a count of them, or 0 for none."""
    columns: dict[Column, str] = Field(default={})
    """Trimtab's name of a column: your file's name of it; for example {prompt: question, completion: answer}."""
    ignore: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = ()
    """Columns, and keys of messages, to ignore; without this, those that would be lost are an error."""
    max_length: Annotated[int, Field(ge=2)] | None = None
    """The most tokens an example may have; the model's context length unless set."""
    overlong: Literal["refuse", "truncate"] = "refuse"
    """What happens to a longer example. A truncated one teaches the model to stop mid-sentence, or never."""
    bad_rows: Literal["stop", "skip"] = "stop"
    """Whether examples that can't be used stop the run before it starts, or are left out and listed in the run's data.json."""

    @property
    def sources(self) -> tuple[str, ...]:
        """Every source that is named, validation's too."""
        return (*self.train, self.eval) if isinstance(self.eval, str) else self.train


@dataclass
class LoadedData:
    """The data of a run, ready to be packed."""

    train: list[TokenRow]
    eval: list[TokenRow]
    reports: list[SourceReport]
    digest: str
    """SHA-256 over every token and target, in order, of training and validation."""

    def plain(self) -> dict[str, Any]:
        """What a run stores about its data, as JSON data."""
        paths = dict.fromkeys(path for report in self.reports for name in report.sources for path in local_files(name))
        return {
            "digest": self.digest,
            "sources": [report.plain() for report in self.reports],
            "files": {str(path): sha256_file(path) for path in paths},
            "held_out": sorted({row.where for row in self.eval}),
        }


def load_examples(
    sources: tuple[str, ...] | str,
    columns: Mapping[Column, str] | None = None,
    kind: Kind = "answers",
    ignore: tuple[str, ...] = (),
) -> tuple[list[Example], SourceReport]:
    """Every usable example of one or more sources. See `data.read.read_rows` for what a source can be."""
    report = SourceReport((sources,) if isinstance(sources, str) else sources)
    return list(_examples(report, columns or {}, kind, ignore)), report


def _examples(
    report: SourceReport, columns: Mapping[Column, str], kind: Kind, ignore: tuple[str, ...], first: int | None = None
) -> Iterator[Example]:
    """The usable examples of the report's sources, read lazily, from the first so many rows; the report is filled meanwhile."""
    rows = islice((row for source in report.sources for row in read_rows(source, report)), first)
    return read_examples(rows, columns, report, FORMATS[kind], ignore)


def first_examples(config: DataConfig, count: int, kind: Kind = "answers") -> list[Example]:
    """The first so many usable training examples, and as many of a validation file."""
    return [
        example
        for sources in (config.train, config.sources[len(config.train) :])
        for example in islice(_examples(SourceReport(sources), config.columns, kind, config.ignore), count)
    ]


def check_first_examples(config: DataConfig, kind: Kind = "answers") -> None:
    """Read the first examples of every local source, before anything that takes longer. Raises DataError if none can be used."""
    for source in filter(is_local, config.sources):
        report = SourceReport((source,))
        usable = next(_examples(report, config.columns, kind, config.ignore, FIRST), None)
        if usable is None and config.bad_rows == "stop":
            raise DataError(
                f"data: none of the first {len(report.rejected)} examples of {source} can be used:\n{_reasons(report)}"
            )


def load_data(
    config: DataConfig,
    base: Tokenizing,
    context_length: int | None,
    seed: int,
    kind: Kind = "answers",
    *,
    positions: int = 0,
) -> LoadedData:
    """The token rows of everything that `config` names.

    Args:
        kind: What the objective trains on.
        positions: How many positions of the context virtual tokens take.

    Raises:
        DataError: A source can't be read, nothing in it can be used, or (unless `bad_rows` is skip) some of it can't.
    """
    limit = _length_limit(config, context_length, positions)
    rows, report = _load_rows(config.train, config, base, limit, kind)
    if isinstance(config.eval, str):
        validation, validation_report = _load_rows((config.eval,), config, base, limit, kind)
        return LoadedData(rows, validation, [report, validation_report], _digest(rows, validation))
    places = list(dict.fromkeys(row.where for row in rows))  # an example that is listed twice is held out in both places
    chosen = _held_out(config.eval, places, seed)
    train = [row for row in rows if row.where not in chosen]
    validation = [row for row in rows if row.where in chosen]
    return LoadedData(train, validation, [report], _digest(train, validation))


def _length_limit(config: DataConfig, context_length: int | None, positions: int) -> LengthLimit:
    truncate, left = config.overlong == "truncate", (context_length or 0) - positions
    if context_length is None or (config.max_length is not None and config.max_length <= left):
        return LengthLimit(config.max_length, truncate)
    taken = f"the {left:,} tokens that {positions} virtual ones leave of the context"
    return LengthLimit(left, truncate, taken if positions else f"the context length {left:,}")


def _load_rows(
    sources: tuple[str, ...], config: DataConfig, base: Tokenizing, limit: LengthLimit, kind: Kind
) -> tuple[list[TokenRow], SourceReport]:
    """The token rows of these sources, from the cache if it has them, and the report of their examples."""
    settings = {"kind": kind, "columns": config.columns, "ignore": config.ignore, "limit": limit}
    cache = TokenCache(sources, settings, base)
    if (cached := cache.read()) is not None:
        rows, report = cached
    else:
        report = SourceReport(sources)
        rows = tokenize_examples(_examples(report, config.columns, kind, config.ignore), base, report, limit)
        cache.write(rows, report)
    if report.used == 0:
        raise DataError(f"data: no example of {report.name} can be used:\n{_reasons(report)}\n{report}")
    if report.rejected and config.bad_rows == "stop":
        too_long = any("up to the end of its last answer, more than" in example.reason for example in report.rejected)
        cut = " (or truncate long ones with data.overlong=truncate)" if too_long else ""
        raise DataError(
            f"data: examples that can't be used:\n{_reasons(report)}\n{report}\n"
            f"Fix them, or leave them out with data.bad_rows=skip{cut}."
        )
    return rows, report


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
    sources = config.eval if isinstance(config.eval, str) else config.train
    held_out = set(stored["held_out"])
    examples, _ = load_examples(sources, config.columns, kind, config.ignore)
    return [example for example in examples if example.where in held_out]


def _held_out(wanted: float, places: list[str], seed: int) -> set[str]:
    """Places of validation examples: a fraction of all, or a count of them."""
    count = round(wanted * len(places)) if wanted < 1 else round(wanted)
    if wanted:
        count = max(count, 1)
        if count >= len(places):
            raise DataError(
                f"data.eval: {wanted:g} would hold out {count} of {len(places)} usable examples and leave none to train on. "
                "Give a smaller fraction or count, a file of its own, or 0."
            )
    return {places[n] for n in split(len(places), count, seed)[1]}


def _reasons(report: SourceReport) -> str:
    """Why examples were rejected, a line each reason, with the first place that it holds for."""
    places: dict[str, list[str]] = {}
    for where, reason in report.rejected:
        places.setdefault(reason, []).append(where)
    return listing([f"{where}{f' and {len(more)} more' if more else ''}: {why}" for why, (where, *more) in places.items()])


def _digest(*parts: list[TokenRow]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(b"part")
        for row in part:
            digest.update(f"{row.ids}{row.target_indices}{row.side or ''}".encode())
    return digest.hexdigest()
