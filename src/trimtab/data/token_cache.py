"""Tokenized rows, kept from one run to the next, and found again by a hash of everything that they are made from."""

import hashlib
import json
import os
import sys
from array import array
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from trimtab.core.cache import cache_folder, code_hash, keep_newest
from trimtab.core.errors import StorageError
from trimtab.core.files import sha256_file, write_bytes
from trimtab.data.example import Account, Refusal, TokenRow
from trimtab.data.read import local_files
from trimtab.data.rendering import Tokenizing
from trimtab.data.token_rows import shared

Made = tuple[list[TokenRow], Account]

LEAST = 1_000_000
"""Bytes of data whose tokens are kept; those of less are made in a second."""
KEPT = 16
"""How many files of tokens are kept; the one that was asked for longest ago goes first."""


def tokenized_once(sources: tuple[str, ...], settings: dict[str, Any], base: Tokenizing, make: Callable[[], Made]) -> Made:
    """What `make` makes of these sources and settings; or has made before, of the same.

    A damaged file of the cache is made anew, and one that can't be written is done without.
    """
    key = _key(sources, settings, base)
    if key is None:
        return make()
    path = cache_folder() / "tokens" / f"{key}.safetensors"
    if (found := _read(path)) is not None:
        with suppress(OSError):
            os.utime(path)
        return found
    made = make()
    if _key(sources, settings, base) == key:  # no file has changed while it was read
        with suppress(StorageError, OSError):
            write_bytes(path, _as_bytes(made))
            keep_newest(path.parent, "*.safetensors", KEPT)
    return made


def _key(sources: tuple[str, ...], settings: dict[str, Any], base: Tokenizing) -> str | None:
    """A hash of all that decides the tokens; None if it isn't all known, or not worth the keeping."""
    paths: list[Path] = []
    for source in sources:
        if not (inside := local_files(source)):
            return None
        paths += inside
    try:
        if sum(path.stat().st_size for path in paths) < LEAST or (tokenizing := base.tokenizing_hash) is None:
            return None
        files = [(str(path), sha256_file(path)) for path in paths]
    except OSError:
        return None  # and whoever reads it says so
    parts = {
        "code": code_hash(sys.modules[__package__]),
        "tokenizing": tokenizing,
        "sources": sources,
        "files": files,
        "settings": settings,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _as_bytes(made: Made) -> bytes:
    sequences, account = made
    words = {
        "where": [s.where for s in sequences],
        "side": [s.side for s in sequences],
        "sources": account.sources,
        "used": account.used,
        "refused": account.refused,
        "unread": sorted(account.unread),
        "nulls": account.nulls,
    }
    learned = bytearray()
    for one in sequences:
        mask = bytearray(len(one.ids))
        for place in one.target_indices:
            mask[place] = 1
        learned += mask
    tensors = {
        "ids": _tensor(array("i", (n for s in sequences for n in s.ids)), torch.int32),
        "learned": _tensor(learned, torch.uint8),
        "sizes": _tensor(array("i", (n for s in sequences for n in (len(s.ids), s.shown))), torch.int32),
        "words": _tensor(bytearray(json.dumps(words).encode()), torch.uint8),
    }
    return save(tensors, {"digest": _digest(tensors)})


def _read(path: Path) -> Made | None:
    """What was kept there, if anything, and whole."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            if (file.metadata() or {}).get("digest") != _digest(tensors):
                return None
    except (OSError, SafetensorError):
        return None
    words, learned = json.loads(tensors["words"].numpy().tobytes()), tensors["learned"].numpy().tobytes()
    rows, start = [], 0
    sizes = tensors["sizes"].view(-1, 2).tolist()
    for where, side, (size, shown) in zip(words["where"], words["side"], sizes, strict=True):
        ids = shared(tensors["ids"][start : start + size].tolist())
        marked = shared([n for n, mark in enumerate(learned[start : start + size]) if mark])
        rows.append(TokenRow(ids, marked, where, shown, side))
        start += size
    refused = [Refusal(*refusal) for refusal in words["refused"]]
    return rows, Account(tuple(words["sources"]), words["used"], refused, set(words["unread"]), words["nulls"])


def _tensor(held: "array[int] | bytearray", kind: torch.dtype) -> Tensor:
    return torch.frombuffer(held, dtype=kind) if held else torch.zeros(0, dtype=kind)


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
