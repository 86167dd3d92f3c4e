"""A tokenized corpus on disk: shards of tokens and of the documents in them, each complete once its record is there.

Shards end with a document, the first one after `SHARD_TOKENS`, so a corpus has the same ones however often tokenizing it was interrupted.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trimtab.core import files
from trimtab.core.errors import ArtifactError
from trimtab.data.example import RejectedExample, SourceReport

FORMAT = 1
SHARD_TOKENS = 1 << 24
"""A shard has fewer tokens than that and one document: 32 MB, or 64 of a large vocabulary. It is what a kill loses at most."""
DOCUMENT = np.dtype([(name, "<u4") for name in ("start", "file", "line", "column")] + [("content", "<u8")])
"""Of a document: its first token in the shard; its place (the number of its file, its line, and its column or 0); a hash of its tokens."""
LISTED = 1000
"""Rejected documents that are listed; the others are counted."""
Ids = NDArray[Any]
"""Tokens: n, uint16 or uint32."""


class Cursor(NamedTuple):
    """How far the sources have been read."""

    part: int = 0
    """The number of a file, or of a dataset that is read as one."""
    rows: int = 0
    """Its rows that have been read."""
    before: int = 0
    """Rows of the parts before that belong to the same source."""


@dataclass(frozen=True)
class Tally:
    """What became of the documents up to a cursor."""

    used: int = 0
    rejected: tuple[tuple[str, str], ...] = ()
    """Places and reasons, of the first ones."""
    unlisted: int = 0
    """Rejected ones beyond those."""
    ignored_columns: tuple[str, ...] = ()

    def with_rejected(self, where: str, reason: str) -> "Tally":
        if len(self.rejected) >= LISTED:
            return replace(self, unlisted=self.unlisted + 1)
        return replace(self, rejected=(*self.rejected, (where, reason)))

    def with_used(self) -> "Tally":
        return replace(self, used=self.used + 1)

    def with_ignored(self, columns: set[str]) -> "Tally":
        return replace(self, ignored_columns=tuple(sorted({*self.ignored_columns, *columns})))

    def report(self, sources: tuple[str, ...], name: str) -> SourceReport:
        rejected = [RejectedExample(where, reason) for where, reason in self.rejected]
        return SourceReport(sources, name, self.used, rejected, self.unlisted, ignored_columns=set(self.ignored_columns))


@dataclass(frozen=True)
class Record:
    """What is known of a shard, and where the one after it begins."""

    tokens: int
    documents: int
    sha256: dict[str, str]
    """Of its files, by their endings."""
    cursor: Cursor
    tally: Tally
    first: int
    """The index of a document's first target."""
    last: bool


@dataclass
class Shard:
    """A shard that is being filled."""

    tokens: int = 0
    first: int = 1
    ids: list[Ids] = field(default_factory=list)
    documents: list[tuple[int, int, int, int, int]] = field(default_factory=list)

    def add(self, ids: Ids, content: int, place: tuple[int, int, int]) -> None:
        self.documents.append((self.tokens, *place, content))
        self.ids.append(ids)
        self.tokens += len(ids)


class CorpusFolder:
    """The folder of a corpus in the cache."""

    def __init__(self, path: Path, wide: bool) -> None:
        """
        Args:
            wide: Whether tokens take four bytes each, rather than two.
        """
        self.path, self.dtype = path, np.dtype("<u4" if wide else "<u2")

    def file(self, number: int, ending: str) -> Path:
        return self.path / f"{number:06d}.{ending}"

    def write(self, number: int, shard: Shard, cursor: Cursor, tally: Tally, last: bool) -> Record:
        """Write a shard, its record at the end. Raises StorageError; what was written before stays."""
        ids = np.concatenate(shard.ids) if shard.ids else np.zeros(0, self.dtype)
        contents = {"tokens": ids.astype(self.dtype), "documents": np.array(shard.documents, DOCUMENT)}
        digests = {}
        for ending, array in contents.items():
            files.write_bytes(self.file(number, ending), array.tobytes())
            digests[ending] = files.sha256_file(self.file(number, ending))
        record = Record(len(ids), len(shard.documents), digests, cursor, tally, shard.first, last)
        files.write_manifest(self.file(number, "json"), FORMAT, asdict(record) | {"cursor": list(cursor)})
        return record

    def remove_unfinished(self) -> None:
        """Remove what processes that were killed have left. Raises StorageError."""
        for path in self.path.glob(f"{files.TEMPORARY}*"):
            files.remove_file(path)

    def records(self) -> dict[int, Record]:
        """The records of all shards that are there whole, by their numbers: their files are what they were written as."""
        numbers = sorted(int(path.stem) for path in self.path.glob("*.json") if path.stem.isdecimal())
        with ThreadPoolExecutor() as pool:  # hashing releases the GIL
            found = pool.map(self._record, numbers)
        return {number: record for number, record in zip(numbers, found, strict=True) if record is not None}

    def _record(self, number: int) -> Record | None:
        with suppress(ArtifactError, OSError, TypeError, ValueError):
            plain = files.read_manifest(self.file(number, "json"), FORMAT, set(Record.__dataclass_fields__))
            tally = {**plain["tally"], "rejected": tuple((where, reason) for where, reason in plain["tally"]["rejected"])}
            del plain["format"], plain["digest"]
            record = Record(**{**plain, "cursor": Cursor(*plain["cursor"]), "tally": Tally(**tally)})
            sizes = {"tokens": record.tokens * self.dtype.itemsize, "documents": record.documents * DOCUMENT.itemsize}
            for ending, size in sizes.items():
                path = self.file(number, ending)
                if path.stat().st_size != size or files.sha256_file(path) != record.sha256[ending]:
                    return None
            return record
        return None


class TokenFiles:
    """The tokens and documents of a corpus, as memory maps. Tokens are counted from its first, documents too."""

    OPEN = 256
    """Shards that are mapped at a time."""

    def __init__(self, folder: CorpusFolder, records: Sequence[Record], names: Sequence[str]) -> None:
        """
        Args:
            names: Of the files that it was made of, in their order.
        """
        self.folder, self.names = folder, names
        self._first_tokens = _sums(record.tokens for record in records)
        self._first_documents = _sums(record.documents for record in records)
        self.tokens, self.documents = int(self._first_tokens[-1]), int(self._first_documents[-1])
        self.digest = files.json_digest([record.sha256["tokens"] for record in records])
        self._open: dict[int, tuple[Ids, NDArray[Any]]] = {}

    def take(self, start: int, end: int) -> Ids:
        """The tokens [start, end)."""
        parts = []
        while start < end:
            number, first = self._shard(start)
            parts.append(self._maps(number)[0][start - first : end - first])
            start += len(parts[-1])
        return np.concatenate(parts) if len(parts) != 1 else parts[0]

    def starts(self, start: int, end: int) -> list[int]:
        """The first tokens of the document that token `start` belongs to, and of those that begin behind it and before `end`."""
        found: list[int] = []
        while start < end:
            number, first = self._shard(start)
            starts = self._maps(number)[1]["start"]
            low = int(np.searchsorted(starts, start - first, "right")) - 1
            high = int(np.searchsorted(starts, end - first, "left"))
            found += [first + int(at) for at in starts[low:high]]
            start = int(self._first_tokens[number + 1])
        return found

    def document(self, number: int) -> tuple[int, int]:
        """The tokens [start, end) of a document."""
        shard = int(np.searchsorted(self._first_documents, number, "right")) - 1
        starts, first = self._maps(shard)[1]["start"], int(self._first_tokens[shard])
        at = number - int(self._first_documents[shard])
        end = int(starts[at + 1]) if at + 1 < len(starts) else int(self._first_tokens[shard + 1]) - first
        return first + int(starts[at]), first + end

    def where(self, token: int) -> str:
        """The place of the document that a token belongs to, as file:line."""
        number, first = self._shard(token)
        documents = self._maps(number)[1]
        _, file, line, column, _ = documents[int(np.searchsorted(documents["start"], token - first, "right")) - 1].item()
        return f"{self.names[file]}:{line}:{column}" if column else f"{self.names[file]}:{line}"

    def contents_of(self, documents: Sequence[int]) -> NDArray[np.uint64]:
        """The hashes of the tokens of these documents."""
        places = ((int(np.searchsorted(self._first_documents, number, "right")) - 1, number) for number in documents)
        found = [self._maps(shard)[1]["content"][number - self._first_documents[shard]] for shard, number in places]
        return np.array(found, np.uint64)

    def find_contents(self, hashes: NDArray[np.uint64]) -> Iterator[tuple[int, int]]:
        """The numbers of the documents that have one of these hashes, and the hash; shard by shard."""
        for shard in range(len(self._first_documents) - 1):
            contents = self._maps(shard)[1]["content"]
            for at in np.flatnonzero(np.isin(contents, hashes)).tolist():
                yield int(self._first_documents[shard]) + at, int(contents[at])

    def _shard(self, token: int) -> tuple[int, int]:
        number = int(np.searchsorted(self._first_tokens, token, "right")) - 1
        return number, int(self._first_tokens[number])

    def _maps(self, number: int) -> tuple[Ids, NDArray[Any]]:
        if number not in self._open:
            while len(self._open) >= self.OPEN:
                del self._open[next(iter(self._open))]
            tokens = int(self._first_tokens[number + 1] - self._first_tokens[number])
            documents = int(self._first_documents[number + 1] - self._first_documents[number])
            self._open[number] = (
                _mapped(self.folder.file(number, "tokens"), self.folder.dtype, tokens),
                _mapped(self.folder.file(number, "documents"), DOCUMENT, documents),
            )
        return self._open[number]


def _sums(sizes: Iterator[int]) -> NDArray[np.int64]:
    return np.cumsum([0, *sizes], dtype=np.int64)


def _mapped(path: Path, dtype: Any, size: int) -> NDArray[Any]:
    if not size:  # which can't be mapped
        return np.zeros(0, dtype)
    try:
        mapped = np.memmap(path, dtype=dtype, mode="r", shape=(size,))
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{path}: a shard of the tokenized corpus is gone or damaged ({error}). Start the command again."
        ) from None
    return mapped.view(np.ndarray)
