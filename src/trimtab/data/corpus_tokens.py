"""Tokenizes the documents of a corpus into the cache, shard by shard; a process that is killed loses the shard that it was filling."""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from typing import Any

from trimtab.core.cache import cache_folder, code_hash
from trimtab.core.errors import DataError, LockHeld
from trimtab.core.locks import file_lock
from trimtab.data.config import DataConfig
from trimtab.data.corpus_documents import Document, documents, parts_of_sources, rows_from
from trimtab.data.corpus_files import SHARD_TOKENS, CorpusFolder, Cursor, Record, Shard, Tally, TokenFiles
from trimtab.data.example import SourceReport
from trimtab.data.examples import reasons
from trimtab.data.rendering import Tokenizing
from trimtab.data.source import Source

TWO_BYTES = 1 << 16
OnStage = Callable[[str], None]
LOCK = ".lock"
PATIENCE = 0.2
"""Seconds between two looks at whether another process has finished."""


class Tokenized:
    """The tokens of a named source, or of all sources without a name.

    Raises:
        DataError: A source can't be read, or (unless `bad_rows` is skip) some of its documents can't be used.
        StorageError: The cache can't be written; what was tokenized before stays.
    """

    def __init__(self, name: str, sources: Sequence[Source], config: DataConfig, base: Tokenizing, on_stage: OnStage) -> None:
        self.name, self._config, self._base, self._on_stage = name, config, base, on_stage
        self.parts = parts_of_sources(sources)
        path = cache_folder() / "corpora" / self._key(sources)
        self._folder = CorpusFolder(path, wide=len(base.tokenizer) > TWO_BYTES)
        self._columns = set[str]()
        records = self._whole(self._folder.records())
        while not records:
            with ExitStack() as stack:
                try:
                    alone = stack.enter_context(file_lock(path / LOCK, "tokenizing"))
                except LockHeld:
                    on_stage("waiting for another process that tokenizes the same corpus")
                    time.sleep(PATIENCE)
                    continue
                if alone:
                    self._folder.remove_unfinished()
                records = self._make(self._folder.records())
        self.report = self._report(tuple(source.path for source in sources), records[-1].tally)
        self.first = records[0].first
        self.files = TokenFiles(self._folder, records, [part.name for part in self.parts])

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of every file that was read."""
        return {part.name: part.digest for part in self.parts if part.stamp}

    def _key(self, sources: Sequence[Source]) -> str:
        """A hash of all that decides the tokens: not of where the files lie."""
        parts = {
            "code": code_hash(sys.modules[__package__]),
            "tokenizer": tokenizer_hash(self._base),
            "files": [(part.number, part.name.rpartition("/")[2], part.digest) for part in self.parts],
            "reading": [self._config.of(source).reading for source in sources],
            "choice": [(source.subset, source.split, source.limit) for source in sources],
            "shard": SHARD_TOKENS,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @staticmethod
    def _whole(records: dict[int, Record]) -> list[Record]:
        """All shards, if none is missing."""
        last = next((number for number, record in records.items() if record.last), -1)
        return [records[number] for number in range(last + 1)] if all(n in records for n in range(last + 1)) else []

    def _make(self, sound: dict[int, Record]) -> list[Record]:
        """All shards, of which those that are missing or damaged are made."""
        records: list[Record] = []
        stream: Iterator[Document] | None = None
        if sound:
            self._on_stage(f"going on with a corpus of which {sum(one.tokens for one in sound.values()):,} tokens are there")
        while not records or not records[-1].last:
            number, before = len(records), records[-1] if records else None
            if number in sound:
                stream = None
                records.append(sound[number])
            else:
                stream = stream or self._documents(before.cursor if before else Cursor())
                records.append(self._next(number, stream, before))
        return records

    def _documents(self, cursor: Cursor) -> Iterator[Document]:
        return documents(rows_from(self.parts, cursor, self._config, self._columns), self._base)

    def _next(self, number: int, stream: Iterator[Document], before: Record | None) -> Record:
        """Fill and write the next shard."""
        started, shard = time.perf_counter(), Shard(first=before.first if before else 1)
        cursor, tally = (before.cursor, before.tally) if before else (Cursor(), Tally())
        last = True
        for document in stream:
            cursor = document.item.cursor
            if document.problem:
                tally = tally.with_rejected(document.item.where, document.problem)
                continue
            shard.add(*document.array(self._folder.dtype), document.item.place)
            shard.first, tally = document.first, tally.with_used()
            if shard.tokens >= SHARD_TOKENS:
                last = False
                break
        tally = tally.with_ignored(self._columns)
        self._report((), tally)  # refuses before anything is written
        record = self._folder.write(number, shard, cursor, tally, last)
        rate = shard.tokens / (time.perf_counter() - started)
        self._on_stage(
            f"tokenizing: file {cursor.part + 1:,} of {len(self.parts):,}, {tally.used:,} documents, {rate / 1e6:.1f} M tokens a second"
        )
        return record

    def _report(self, sources: tuple[str, ...], tally: Tally) -> SourceReport:
        report = tally.report(sources, self.name)
        if report.rejected and self._config.bad_rows == "stop":
            raise DataError(
                f"data: documents that can't be used:\n{reasons(report)}\nFix them, or leave them out with data.bad_rows=skip."
            )
        if sources and not report.used:
            raise DataError(f"data: no document of {report.name} can be used:\n{reasons(report)}\n{report}")
        return report


def tokenizer_hash(base: Tokenizing) -> str:
    """A hash of all that decides what tokens a plain text becomes."""
    state: dict[str, Any] = json.loads(base.tokenizer.backend_tokenizer.to_str())
    for setting in ("truncation", "padding"):  # of the last call, not of the tokenizer
        state.pop(setting, None)
    size = len(base.tokenizer)
    unusable = [token for token in range(size) if base.embedding_problem([token])]
    facts = [type(base.tokenizer).__name__, state, base.end_of_text, size, unusable, version("tokenizers")]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
