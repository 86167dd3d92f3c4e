"""The data of a run: read, tokenized and split into training and validation, with a report of every example."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from trimtab.core.errors import DataError
from trimtab.core.files import sha256_file
from trimtab.data.config import DataConfig
from trimtab.data.corpus import Corpus
from trimtab.data.corpus_load import SAMPLE, load_corpus, refuse_much
from trimtab.data.corpus_tokens import OnStage
from trimtab.data.duplicates import without_repeated, without_texts_of
from trimtab.data.example import Kind, SourceReport, TokenRow, row_groups
from trimtab.data.examples import Named, examples_of, reasons, report_of
from trimtab.data.held_out import places_held_out
from trimtab.data.lengths import LengthLimit
from trimtab.data.mixture import Share, shares
from trimtab.data.read import local_files
from trimtab.data.rendering import Tokenizing
from trimtab.data.source import Objects, Source
from trimtab.data.system_message import check_system
from trimtab.data.token_cache import TokenCache
from trimtab.data.token_rows import tokenize_examples


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
    corpus: Corpus | None = None
    """What is trained on, if it need not fit into memory; `train` is a sample of its rows then, for the checks."""
    digests: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the corpus' files."""

    @property
    def shares(self) -> dict[str, Share]:
        """What each named source contributes to an epoch."""
        if self.corpus is not None:
            return self.corpus.shares(Counter(row.source for row in self.eval))
        return shares(self.train, self.eval, self.weights)

    @property
    def examples(self) -> int:
        """How many there are to train on: of a corpus, blocks."""
        return len(self.corpus) if self.corpus is not None else len(row_groups(self.train))

    @property
    def target_tokens(self) -> int:
        """How many there are to train on, each counted once."""
        if self.corpus is not None:
            return self.corpus.targets
        return sum(len(row.target_indices) for row in self.train if row.side != "mismatched")

    def plain(self) -> dict[str, Any]:
        """What a run stores about its data, as JSON data."""
        paths = dict.fromkeys(path for report in self.reports for name in report.sources for path in local_files(name))
        return {
            "digest": self.digest,
            "seed": self.seed,
            "sources": [report.plain() for report in self.reports],
            "files": {str(path): self.digests.get(str(path)) or sha256_file(path) for path in paths},
            "held_out": sorted({row.where for row in self.eval}),
        }


def load_data(
    config: DataConfig,
    base: Tokenizing,
    context_length: int | None,
    seed: int,
    kind: Kind = "answers",
    *,
    positions: int = 0,
    on_stage: OnStage = lambda _: None,
) -> LoadedData:
    """The token rows of everything that `config` names.

    Args:
        seed: Decides which examples are held out, and which are in the sample of a source.
        kind: What the objective trains on.
        positions: How many positions of the context virtual tokens take.
        on_stage: Is told how far a corpus is tokenized.

    Raises:
        DataError: A source can't be read, nothing in it can be used, or (unless `bad_rows` is skip) some of it can't.
        RecipeError: The base's chat template has no system messages, and `config` wants one.
    """
    check_system(config.system, base)
    loader = _Loader(config, base, length_limit(config, context_length, positions), seed, kind)
    if config.corpus:
        return _load_corpus(config, loader, on_stage)
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
    data = LoadedData(rows, held_out, reports, _digest(config.weights, rows, held_out), config.weights, seed)
    _ = data.shares  # refuses a weight that is too small
    return data


def _load_corpus(config: DataConfig, loader: "_Loader", on_stage: OnStage) -> LoadedData:
    """Training texts in the cache, validation texts in memory, cut into blocks as well."""
    loaded = load_corpus(config, loader.base, loader.limit.tokens, loader.seed, on_stage)
    loader.config = config.model_copy(update={"corpus": False})
    loader.limit = loader.limit._replace(overlong="split")
    validation = [loader.load(named) for named in config.eval_sources.items()]
    held_out = [*loaded.held_out, *(row for rows, _ in validation for row in rows)]
    refuse_much(sum(len(row.ids) for row in held_out), "it names texts", sum(report.used for _, report in validation))
    reports = [*loaded.reports, *(report for _, report in validation)]
    digest = _digest({}, held_out) + loaded.corpus.digest
    sample = loaded.corpus.sample(SAMPLE)
    digest = hashlib.sha256(digest.encode()).hexdigest()
    data = LoadedData(sample, held_out, reports, digest, config.weights, loader.seed, loaded.corpus, loaded.digests)
    _ = data.shares  # refuses a weight that is too small
    return data


def load_rows(
    source: Source | Objects,
    config: DataConfig,
    base: Tokenizing,
    context_length: int | None,
    seed: int,
    kind: Kind = "answers",
) -> list[TokenRow]:
    """The token rows of a source, read with the settings of `config`, whose own sources are left alone. Raises as `load_data` does."""
    check_system(config.system, base)
    parts = [_Loader(config, base, length_limit(config, context_length), seed, kind).load(("", [source]))]
    if config.duplicates == "remove":
        _remove_duplicates(parts, [])
    return parts[0][0]


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

    def load(self, named: Named) -> Loaded:
        """The token rows of a source, from the cache if it has them, and the report of its examples."""
        name, sources = named
        cache = TokenCache(sources, self._settings(sources), self.base)
        if (cached := cache.read()) is not None:
            rows, report = cached
        else:
            report = report_of(("", sources))
            examples = examples_of(("", sources), self.config, self.kind, self.seed, report)
            rows = tokenize_examples(examples, self.base, report, self.limit)
            cache.write(rows, report)
        report.label = name
        self._refuse_unusable(report)
        return [replace(row, source=name) for row in rows] if name else rows, report

    def _settings(self, sources: Sequence[Source | Objects]) -> dict[str, Any]:
        """What decides the tokens of a source besides its files."""
        parts = [
            (source.subset, source.split, source.limit, source.limit and self.seed, self.config.of(source).reading)
            for source in sources
        ]
        return {"kind": self.kind, "limit": self.limit, "sources": parts}

    def _refuse_unusable(self, report: SourceReport) -> None:
        if report.used == 0:
            why = reasons(report) or f"  all are longer than {self.limit}: raise data.max_length, or truncate them"
            raise DataError(f"data: no example of {report.name} can be used:\n{why}\n{report}")
        if report.rejected and self.config.bad_rows == "stop":
            too_long = any("up to the end of its last answer, more than" in example.reason for example in report.rejected)
            cut = " (or truncate or drop long ones with data.overlong)" if too_long else ""
            raise DataError(
                f"data: examples that can't be used:\n{reasons(report)}\n{report}\n"
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


def _digest(weights: Mapping[str, float], *parts: list[TokenRow]) -> str:
    digest = hashlib.sha256(str(sorted(weights.items())).encode() if weights else b"")
    for part in parts:
        digest.update(b"part")
        for row in part:
            digest.update(f"{row.ids}{row.target_indices}{row.weights or ''}{row.side or ''}{row.source}".encode())
    return digest.hexdigest()
