"""Token rows that are kept from one run to the next, under a hash of everything that decides them."""

import hashlib
import json
import os
import sys
from array import array
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from trimtab.core import chat
from trimtab.core.cache import cache_folder, code_hash, keep_newest
from trimtab.core.errors import StorageError
from trimtab.core.files import sha256_file, write_bytes
from trimtab.data.example import RejectedExample, SourceReport, TokenRow
from trimtab.data.lengths import interned
from trimtab.data.read import local_files
from trimtab.data.rendering import Tokenizing
from trimtab.data.source import Objects, Source

MIN_BYTES = 1_000_000
"""Bytes of data from which on its tokens are kept; less is tokenized in a second."""
MAX_FILES = 32
"""How many files of tokens are kept; the least recently used one goes first."""


class TokenCache:
    """The file that keeps the token rows of some sources, read with some settings, by one tokenizer and template."""

    def __init__(self, sources: Sequence[Source | Objects], settings: dict[str, Any], base: Tokenizing) -> None:
        self._sources, self._settings, self._base = [source.path for source in sources], settings, base
        self._key = None if any(isinstance(source, Objects) for source in sources) else self._hash()

    def _hash(self) -> str | None:
        """A hash of all that decides the tokens; None if it isn't all known, or the data is too small to keep."""
        paths: list[Path] = []
        for source in self._sources:
            if not (files := local_files(source)):
                return None
            paths += files
        try:
            if sum(path.stat().st_size for path in paths) < MIN_BYTES or (tokenizing := self._base.tokenizing_hash) is None:
                return None
            hashes = [(str(path), sha256_file(path)) for path in paths]
        except OSError:
            return None  # reading the file reports it
        parts = {
            "code": code_hash(sys.modules[__package__], chat),
            "tokenizing": tokenizing,
            "sources": self._sources,
            "files": hashes,
            "settings": self._settings,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def _path(self) -> Path:
        return cache_folder() / "tokens" / f"{self._key}.safetensors"

    def read(self) -> tuple[list[TokenRow], SourceReport] | None:
        """The rows and the report that are kept, if there are any and their file is undamaged."""
        if self._key is None:
            return None
        try:
            with safe_open(self._path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
                if (file.metadata() or {}).get("digest") != _digest(tensors):
                    return None
        except (OSError, SafetensorError):
            return None
        with suppress(OSError):
            os.utime(self._path)
        facts, mask = json.loads(tensors["words"].numpy().tobytes()), tensors["learned"].numpy().tobytes()
        rows, start, weighted, weights = [], 0, set(facts["weighted"]), iter(tensors["weights"].tolist())
        sizes = tensors["sizes"].view(-1, 2).tolist()
        for number, (where, side, (size, full_length)) in enumerate(zip(facts["where"], facts["side"], sizes, strict=True)):
            ids = interned(tensors["ids"][start : start + size].tolist())
            targets = interned([n for n, is_target in enumerate(mask[start : start + size]) if is_target])
            own = [next(weights) for _ in targets] if number in weighted else None
            rows.append(TokenRow(ids, targets, where, full_length, side, weights=own))
            start += size
        report = SourceReport(**facts["report"])
        report.sources, report.ignored_columns = tuple(report.sources), set(report.ignored_columns)
        report.rejected = [RejectedExample(*example) for example in report.rejected]
        return rows, report

    def write(self, rows: list[TokenRow], report: SourceReport) -> None:
        """Keep rows, unless a file has changed while it was read. A failure to write is not an error."""
        if self._key is None or self._hash() != self._key:
            return
        with suppress(StorageError, OSError):
            write_bytes(self._path, _as_bytes(rows, report))
            keep_newest(self._path.parent, "*.safetensors", MAX_FILES)


def _as_bytes(rows: list[TokenRow], report: SourceReport) -> bytes:
    facts = {
        "where": [row.where for row in rows],
        "side": [row.side for row in rows],
        "weighted": [number for number, row in enumerate(rows) if row.weights is not None],
        "report": {**asdict(report), "ignored_columns": sorted(report.ignored_columns)},
    }
    mask = bytearray()
    for row in rows:
        is_target = bytearray(len(row.ids))
        for place in row.target_indices:
            is_target[place] = 1
        mask += is_target
    tensors = {
        "ids": _tensor(array("i", (n for row in rows for n in row.ids)), torch.int32),
        "learned": _tensor(mask, torch.uint8),
        "sizes": _tensor(array("i", (n for row in rows for n in (len(row.ids), row.full_length))), torch.int32),
        "weights": _tensor(array("d", (weight for row in rows for weight in row.weights or ())), torch.float64),
        "words": _tensor(bytearray(json.dumps(facts).encode()), torch.uint8),
    }
    return save(tensors, {"digest": _digest(tensors)})


def _tensor(values: "array[int] | array[float] | bytearray", dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(values, dtype=dtype) if values else torch.zeros(0, dtype=dtype)


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
