"""The documents of a corpus: read file by file, and tokenized in batches while the next ones are read."""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trimtab.core.errors import DataError
from trimtab.core.files import sha256_file
from trimtab.data.config import DataConfig
from trimtab.data.corpus_files import Cursor, Ids
from trimtab.data.example import InvalidExample, SourceReport, Text
from trimtab.data.formats import read_examples
from trimtab.data.plain_texts import WINDOW, encode_long, ended
from trimtab.data.preference_formats import FORMATS
from trimtab.data.read import LONGEST, local_files, read_rows, reads_files
from trimtab.data.rendering import Tokenizing
from trimtab.data.source import Source

BATCH_ROWS = 4096
NO_TEXT = "is {}, and a corpus is of plain texts: leave data.corpus out, or give texts"


class Part(NamedTuple):
    """What is read as one: a file, or a dataset."""

    source: Source
    """The source that it belongs to."""
    number: int
    """Of that source among those of the corpus."""
    name: str
    """Its path, or the dataset's name."""
    digest: str
    """Of its content; of a dataset on the hub, the commit."""
    stamp: tuple[int, ...]
    """What changes with its content, and is looked at again when it has been read."""


def parts_of_sources(sources: Sequence[Source]) -> list[Part]:
    """What a corpus is read from, in its order.

    Raises:
        DataError: There is no such source, or it may change from one day to the next.
    """
    parts: list[Part] = []
    for number, source in enumerate(sources):
        if reads_files(source):
            paths = local_files(source.path)
            with ThreadPoolExecutor() as pool:  # hashing releases the GIL
                digests = list(pool.map(_digest, paths))
            found = zip(paths, digests, strict=True)
            parts += [Part(source, number, str(path), digest, stamp) for path, (digest, stamp) in found]
        else:
            parts.append(Part(source, number, source.path, _dataset_digest(source), ()))
    return parts


def _digest(path: Path) -> tuple[str, tuple[int, ...]]:
    try:
        before = _stamp(path)
        return sha256_file(path), before
    except OSError as error:
        raise DataError(f"data: {path} cannot be read: {error.strerror}.") from None


def _stamp(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _dataset_digest(source: Source) -> str:
    folder = Path(source.path)
    if folder.is_dir():
        visible = sorted(path for path in folder.rglob("*") if path.is_file())
        digests = [(str(path.relative_to(folder)), sha256_file(path)) for path in visible]
        return hashlib.sha256(str(digests).encode()).hexdigest()
    revision = source.revision or ""
    if len(revision) != 40 or set(revision) - set("0123456789abcdef"):
        raise DataError(
            f"data: {source.path} is tokenized once, and its main branch may change: name the commit, as {{NAME: {{path: {source.path}, "
            "revision: COMMIT}}} with the 40 characters that its page on the hub shows."
        )
    return revision


class Item(NamedTuple):
    """A row of a corpus."""

    cursor: Cursor
    """Behind it."""
    place: tuple[int, int, int]
    """The number of its part, its line, and its column or 0."""
    where: str
    text: str
    problem: str
    """Why it can't be used; empty for a text."""


def rows_from(parts: Sequence[Part], start: Cursor, config: DataConfig, columns: set[str]) -> Iterator[Item]:
    """The rows behind a cursor.

    Args:
        columns: Gets the names of the columns that are ignored.
    """
    before = start.before
    for number in range(start.part, len(parts)):
        part, skipped = parts[number], start.rows if number == start.part else 0
        if number and parts[number - 1].number != part.number and number != start.part:
            before = 0
        limit = part.source.limit
        if limit is not None and before >= limit:
            continue
        rows, read, own = _rows(part), 0, config.of(part.source)
        for read, row in enumerate(islice(rows, limit and limit - before), start=1):
            if read > skipped:
                yield _item(row, part.name, Cursor(number, read, before), own, columns)
        before += read
        if part.stamp and _stamp(Path(part.name)) != part.stamp:
            raise DataError(f"data: {part.name} changed while it was read. Start the command again.")


def _rows(part: Part) -> Iterator[Any]:
    source = part.source if not part.stamp else Source(path=part.name)
    return read_rows(source.model_copy(update={"limit": None}), None, None, most=LONGEST)


def _item(row: Any, name: str, cursor: Cursor, config: DataConfig, columns: set[str]) -> Item:
    report = SourceReport((name,))
    examples = list(read_examples((row,), config.columns, report, FORMATS["answers"], config.ignore, config.templates))
    columns |= report.ignored_columns
    where = row[0]
    line, _, column = where.removeprefix(f"{name}:").partition(":")
    place = (cursor.part, int(line), int(column or 0))
    if not examples:
        return Item(cursor, place, where, "", report.rejected[0].reason)
    (example,) = examples
    if not isinstance(example, Text):
        return Item(cursor, place, where, "", NO_TEXT.format("a conversation"))
    if len(example.text) > LONGEST:
        return Item(cursor, place, where, "", f"has {len(example.text):,} characters, more than {LONGEST:,}: divide it")
    return Item(cursor, place, where, example.text, "")


@dataclass(frozen=True)
class Document:
    """A row as tokens."""

    item: Item
    ids: list[int]
    first: int
    """The index of its first target."""
    problem: str

    def array(self, dtype: Any) -> tuple[Ids, int]:
        """Its tokens, and a hash of them."""
        ids = np.array(self.ids, dtype)
        return ids, int.from_bytes(hashlib.blake2b(ids.astype("<u4").tobytes(), digest_size=8).digest(), "little")


def documents(items: Iterator[Item], base: Tokenizing) -> Iterator[Document]:
    """Every row as tokens, in their order; a batch is tokenized while the next one is read."""
    encode = TextEncoder(base)
    with ThreadPoolExecutor(max_workers=1) as pool:
        ahead = None
        for batch in _batches(items):
            now, ahead = ahead, pool.submit(encode.documents, batch)
            if now is not None:
                yield from now.result()
        if ahead is not None:
            yield from ahead.result()


def _batches(items: Iterator[Item]) -> Iterator[list[Item]]:
    batch: list[Item] = []
    characters = 0
    for item in items:
        batch.append(item)
        characters += len(item.text)
        if characters > WINDOW or len(batch) == BATCH_ROWS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class TextEncoder:
    """Tokenizes texts as the base does, but without the offsets of tokens, for half of the time."""

    def __init__(self, base: Tokenizing) -> None:
        self.base, self._backend = base, base.tokenizer.backend_tokenizer
        self._before: int | None = None
        self._same: bool | None = None
        """Whether it has been found to give the same tokens; None before the first batch."""

    def documents(self, batch: Sequence[Item]) -> list[Document]:
        """Each row as tokens, as `plain_texts.tokenize_texts` makes them."""
        short = iter(self._encode([item.text for item in batch if not item.problem and len(item.text) <= WINDOW]))
        return [self._document(item, short) for item in batch]

    def _document(self, item: Item, short: Iterator[tuple[list[int], int]]) -> Document:
        if item.problem:
            return Document(item, [], 1, item.problem)
        ids, before = next(short) if len(item.text) <= WINDOW else encode_long(item.text, self.base)
        first = max(before, 1)
        try:
            ids = ended(ids, self.base)
        except InvalidExample as invalid:
            return Document(item, [], first, str(invalid))
        return Document(item, ids, first, "" if len(ids) > first else "has no token to train on")

    def _encode(self, texts: list[str]) -> list[tuple[list[int], int]]:
        """Of each text its tokens, and how many of them the tokenizer put before it."""
        if not texts:
            return []
        if self._same is None:
            self._probe(texts[:64])
        if not self._same:
            return [(list(one.ids), one.before) for one in self.base.encode(texts, special=True)]
        return [self._without_doubled(found.ids) for found in self._backend.encode_batch_fast(texts)]

    def _without_doubled(self, ids: list[int]) -> tuple[list[int], int]:
        """A text's tokens without a BOS of its own, if the tokenizer puts one before it, too."""
        before = self._before or 0
        return (ids[before:] if before and ids[before : 2 * before] == ids[:before] else ids), before

    def _probe(self, texts: list[str]) -> None:
        expected = [(list(one.ids), one.before) for one in self.base.encode(texts, special=True)]
        self._before = expected[0][1]
        adds = self.base.tokenizer.num_special_tokens_to_add(pair=False)
        fast = [self._without_doubled(found.ids) for found in self._backend.encode_batch_fast(texts)]
        self._same = adds == self._before and expected == fast
