"""The data of a run: read, tokenized and split into training and validation, with a report of every example."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any

from trimtab.core.errors import DataError, listing
from trimtab.core.files import expand_user, sha256_file
from trimtab.data.config import DataConfig
from trimtab.data.duplicates import without_repeated, without_texts_of
from trimtab.data.example import Column, Example, Kind, SourceReport, TokenRow
from trimtab.data.formats import read_examples
from trimtab.data.held_out import places_held_out
from trimtab.data.lengths import LengthLimit
from trimtab.data.preference_formats import FORMATS
from trimtab.data.read import is_local, local_files, read_rows
from trimtab.data.rendering import Tokenizing
from trimtab.data.source import Source
from trimtab.data.system_message import SystemMessage, check_system
from trimtab.data.token_cache import TokenCache
from trimtab.data.token_rows import tokenize_examples

FIRST = 20
"""Examples that are checked before anything else."""
Sources = Mapping[str, tuple[Source, ...]]
"""Sources by name, as `DataConfig` has them."""


@dataclass
class LoadedData:
    """The data of a run, ready to be packed."""

    train: list[TokenRow]
    eval: list[TokenRow]
    reports: list[SourceReport]
    digest: str
    """SHA-256 over every token and target, in order, of training and validation; and over what else decides the order of training."""
    weights: dict[str, float] = field(default_factory=dict)
    """Of each training source, by name; empty where every example is trained on once an epoch."""
    seed: int = 0
    """What decided which examples are held out, and which are in the sample of a source."""

    def plain(self) -> dict[str, Any]:
        """What a run stores about its data, as JSON data."""
        paths = dict.fromkeys(path for report in self.reports for name in report.sources for path in local_files(name))
        return {
            "digest": self.digest,
            "seed": self.seed,
            "sources": [report.plain() for report in self.reports],
            "files": {str(path): sha256_file(path) for path in paths},
            "held_out": sorted({row.where for row in self.eval}),
        }


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
    report = _report(named)
    return list(_examples(named, config, kind, 0, report)), report


def _report(named: tuple[str, tuple[Source, ...]]) -> SourceReport:
    name, sources = named
    return SourceReport(tuple(source.path for source in sources), name)


def _examples(
    named: tuple[str, tuple[Source, ...]],
    config: DataConfig,
    kind: Kind,
    seed: int,
    report: SourceReport | None = None,
    first: int | None = None,
) -> Iterator[Example]:
    """The usable examples of a named source, read lazily, from its first so many rows; the report is filled meanwhile."""
    name, sources = named
    report = report or _report(named)
    for source in sources:
        own = config.of(source)
        rows = read_rows(source if first is None else source.model_copy(update={"limit": None}), report, seed)
        system = SystemMessage(own.system, own.drop_system)
        read = read_examples(islice(rows, first), own.columns, report, FORMATS[kind], own.ignore, own.templates, system)
        for example in read:
            yield replace(example, source=name) if name else example


def first_examples(config: DataConfig, count: int, seed: int, kind: Kind = "answers") -> list[Example]:
    """The first so many usable training examples of each source, and as many for validation."""
    return [
        example
        for named in (*config.train_sources.items(), *config.eval_sources.items())
        for example in islice(_examples(named, config, kind, seed), count)
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
            usable = next(_examples((name, (source,)), config, kind, 0, report, FIRST), None)
            if usable is None and config.bad_rows == "stop":
                raise DataError(
                    f"data: none of the first {len(report.rejected)} examples of {report.name} can be used:\n{_reasons(report)}"
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
        seed: Decides which examples are held out, and which are in the sample of a source.
        kind: What the objective trains on.
        positions: How many positions of the context virtual tokens take.

    Raises:
        DataError: A source can't be read, nothing in it can be used, or (unless `bad_rows` is skip) some of it can't.
        RecipeError: The base's chat template has no system messages, and `config` wants one.
    """
    check_system(config.system, base)
    loader = _Loader(config, base, length_limit(config, context_length, positions), seed, kind)
    train = [loader.load(named) for named in config.train_sources.items()]
    validation = [loader.load(named) for named in config.eval_sources.items()]
    if config.duplicates == "remove":
        _remove_duplicates(train, validation)
    rows = [row for of_source, _ in train for row in of_source]
    held_out = [row for of_source, _ in validation for row in of_source]
    if not validation:
        places = places_held_out(config.eval, rows, seed)
        rows, held_out = ([row for row in rows if (row.where in places) is chosen] for chosen in (False, True))
    reports = [report for _, report in (*train, *validation)]
    return LoadedData(rows, held_out, reports, _digest(config.weights, rows, held_out), config.weights, seed)


def length_limit(config: DataConfig, context_length: int | None, positions: int = 0) -> LengthLimit:
    """How long token rows may be; virtual tokens take some `positions` of the context."""
    left = (context_length or 0) - positions
    if context_length is None or (config.max_length is not None and config.max_length <= left):
        return LengthLimit(config.max_length, config.overlong)
    taken = f"the {left:,} tokens that {positions} virtual ones leave of the context"
    return LengthLimit(left, config.overlong, taken if positions else f"the context length {left:,}")


Loaded = tuple[list[TokenRow], SourceReport]


@dataclass
class _Loader:
    """Loads sources, each by itself, so that its tokens are kept whatever it is mixed with."""

    config: DataConfig
    base: Tokenizing
    limit: LengthLimit
    seed: int
    kind: Kind

    def load(self, named: tuple[str, tuple[Source, ...]]) -> Loaded:
        """The token rows of a source, from the cache if it has them, and the report of its examples."""
        name, sources = named
        cache = TokenCache(sources, self._settings(sources), self.base)
        if (cached := cache.read()) is not None:
            rows, report = cached
        else:
            report = _report(("", sources))
            examples = _examples(("", sources), self.config, self.kind, self.seed, report)
            rows = tokenize_examples(examples, self.base, report, self.limit)
            cache.write(rows, report)
        report.label = name
        self._refuse_unusable(report)
        return [replace(row, source=name) for row in rows] if name else rows, report

    def _settings(self, sources: Sequence[Source]) -> dict[str, Any]:
        """What decides the tokens of a source besides its files."""
        parts = [
            (source.subset, source.split, source.limit, source.limit and self.seed, self.config.of(source).reading)
            for source in sources
        ]
        return {"kind": self.kind, "limit": self.limit, "sources": parts}

    def _refuse_unusable(self, report: SourceReport) -> None:
        if report.used == 0:
            why = _reasons(report) or f"  all are longer than {self.limit}: raise data.max_length, or truncate them"
            raise DataError(f"data: no example of {report.name} can be used:\n{why}\n{report}")
        if report.rejected and self.config.bad_rows == "stop":
            too_long = any("up to the end of its last answer, more than" in example.reason for example in report.rejected)
            cut = " (or truncate or drop long ones with data.overlong)" if too_long else ""
            raise DataError(
                f"data: examples that can't be used:\n{_reasons(report)}\n{report}\n"
                f"Fix them, or leave them out with data.bad_rows=skip{cut}."
            )


def _remove_duplicates(train: list[Loaded], validation: list[Loaded]) -> None:
    """Remove examples that repeat an earlier one of their part, and training examples that are validation examples, in place."""
    held_out = [row for rows, _ in validation for row in rows]
    for part in (train, validation):
        seen: set[bytes] = set()
        for number, (rows, report) in enumerate(part):
            rows, report.duplicates = without_repeated(rows, seen)
            if part is train:
                rows, report.held_out_too = without_texts_of(held_out, rows)
            report.used -= len(report.duplicates) + len(report.held_out_too)
            if not rows:
                raise DataError(f"data: no example of {report.name} is left without duplicates:\n{report}")
            part[number] = rows, report


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
    sources: Sources = config.eval_sources or config.train_sources
    examples = chain.from_iterable(_examples(named, config, kind, stored["seed"]) for named in sources.items())
    held_out = set(stored["held_out"])
    chosen = [example for example in examples if example.where in held_out]
    if config.duplicates == "remove":  # a file that is given twice has each of its places once
        chosen = list({(example.source, example.where): example for example in chosen}.values())
    return chosen


def _reasons(report: SourceReport) -> str:
    """Why examples were rejected, a line each reason, with the first place that it holds for."""
    places: dict[str, list[str]] = {}
    for where, reason in report.rejected:
        places.setdefault(reason, []).append(where)
    return listing([f"{where}{f' and {len(more)} more' if more else ''}: {why}" for why, (where, *more) in places.items()])


def _digest(weights: Mapping[str, float], *parts: list[TokenRow]) -> str:
    digest = hashlib.sha256(str(sorted(weights.items())).encode() if weights else b"")
    for part in parts:
        digest.update(b"part")
        for row in part:
            digest.update(f"{row.ids}{row.target_indices}{row.side or ''}{row.source}".encode())
    return digest.hexdigest()
