"""What a model is compared with: which model that is, what it makes of every row, computed once, and how far off it is."""

import functools
import hashlib
import json
import math
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

import trimtab.base
import trimtab.core
import trimtab.data
import trimtab.engine
import trimtab.methods
from trimtab.artifacts import sha256_tensor
from trimtab.base import Base
from trimtab.core import cache, files
from trimtab.core.errors import ArtifactError, NonFinite, RecipeError, StorageError, WrongReference
from trimtab.data import pack_all
from trimtab.data.example import TokenRow
from trimtab.deploy import adapter_folder, load_adapter, versions
from trimtab.engine import pack_divergences, pack_logprobs
from trimtab.methods import Attached, activate, active, adapters

PACK_TOKENS = 4096
"""Computed at a time where nothing is kept for a backward pass, so that long prompts are shared, too."""
KEPT = 64
"""How many references are remembered; the one that was asked for longest ago goes first."""
NEAR = (1e-3, 2e-5)
"""How far Σ log p of a row may be from itself in another pack, in float32: in nats, and as a share."""
NEAR_IN_HALF = (0.5, 2e-2)
"""The same in bfloat16 and float16."""


@dataclass
class Referred:
    """Rows that know what the reference makes of them."""

    rows: list[TokenRow]
    facts: dict[str, Any]
    """What a run remembers of its reference, as JSON data."""


def refer(base: Base, adapter: Attached, asked: str, rows: Sequence[TokenRow], pack_tokens: int) -> Referred:
    """Rows with Σ log p of their learned tokens in the reference; from the cache as far as they are known.

    Args:
        adapter: What is to be trained, as it is when training starts.
        asked: As `reference` in an objective.

    Raises:
        RecipeError: There is no such model, or it reads other tokens.
        NonFinite: The reference gives a row a log-probability that is not a number.
    """
    kind = ("start" if adapter.trained else "base") if asked == "auto" else asked
    if kind == "start" and not adapter.trained and adapter.method.identity_at_init:
        kind = "base"
    with _opened(base, adapter, kind) as other:
        path = cache.cache_folder() / "reference" / f"{other.identity}-{_made_by()}.json"
        known = _read(path)
        keys = [_key(row) for row in rows]
        missing = list({key: row for key, row in zip(keys, rows, strict=True) if key not in known}.items())
        if missing:
            with other.acting():
                made = logprobs(other.base, [row for _, row in missing], pack_tokens)
            for (_, row), value in zip(missing, made, strict=True):
                if not math.isfinite(value):
                    raise NonFinite(
                        f"{row.where}: the reference model gives it a log-probability that is not a number: it is broken."
                    )
            known |= {key: value for (key, _), value in zip(missing, made, strict=True)}
            with suppress(StorageError, OSError):
                _write(path, known)
    facts = {"kind": kind, "identity": other.identity, "rows": len(set(keys)), "computed": len(missing)}
    return Referred([replace(row, reference=known[key]) for row, key in zip(rows, keys, strict=True)], facts)


def check_start(base: Base, rows: Sequence[TokenRow], pack_tokens: int) -> float:
    """Measure that what is to be trained starts as its reference on these rows: by how much Σ log p is off at most.

    So DPO starts with margins of 0 and a loss of ln 2.

    Raises:
        WrongReference: It does not.
    """
    nats, share = near(base)
    off = 0.0
    for row, now in zip(rows, logprobs(base, rows, pack_tokens), strict=True):
        off = max(off, abs(now - row.reference))
        if not abs(now - row.reference) <= nats + share * abs(row.reference):
            raise WrongReference(
                f"{row.where}: the model that training starts from gives its answer log p = {now:.6g}, and the reference {row.reference:.6g}, "
                "where they should be the same. What is compared with is not what training starts from: say which is meant "
                f"with objective.reference, or empty {cache.cache_folder() / 'reference'} if it is damaged."
            )
    return off


def near(base: Base) -> tuple[float, float]:
    """How far apart two values of Σ log p of a row may be that should be the same: in nats, and as a share."""
    half = next(base.model.parameters()).dtype in (torch.bfloat16, torch.float16) or base.quantization != "none"
    return NEAR_IN_HALF if half else NEAR


@torch.no_grad()
def divergence(base: Base, adapter: Attached, kind: str, rows: Sequence[TokenRow], pack_tokens: int) -> float:
    """How far the model is from the reference: KL(π ‖ π_reference), in nats a token, the mean over the learned tokens of the rows.

    It is exact: of whole distributions over the vocabulary, given what the row says before each token.

    Args:
        kind: `base`, an adapter or run folder, or a model.
    """
    total, tokens = 0.0, 0
    with _opened(base, adapter, kind) as other:
        for pack in pack_all(rows, pack_tokens):
            found = pack_divergences(base.model, other.base.model, other.acting, pack.to(base.device))
            total += float(found.cpu().double().sum())
            tokens += pack.targets
    return total / max(1, tokens)


class _Other(NamedTuple):
    """A reference that is ready."""

    base: Base
    acting: Callable[[], AbstractContextManager[None]]
    """Within this block the base is the reference; outside, it is what is trained."""
    identity: str
    """A hash of all that it computes with."""


@contextmanager
def _opened(base: Base, adapter: Attached, kind: str) -> Iterator[_Other]:
    """The reference, within the block."""
    if kind == "base":
        yield _Other(base, adapter.disabled, _identity(base, None))
    elif kind == "start":
        yield _Other(base, nullcontext, _identity(base, adapter))
    elif (folder := adapter_folder(kind)) is not None:
        try:
            other = load_adapter(base, folder, name="reference")
        except ArtifactError as error:
            raise RecipeError(f"objective.reference: {error}") from None
        if adapter.name in adapters(base.model):
            activate(base.model, adapter.name)
        try:
            yield _Other(base, lambda: active(base.model, "reference"), _identity(base, other))
        finally:
            other.detach()
    else:
        model = Base.load(base.config.model_copy(update={"name": kind, "template": {}}))  # held as the policy is
        if model.fingerprint["tokenizer"] != base.fingerprint["tokenizer"]:
            raise RecipeError(
                f"objective.reference: {kind} turns texts into other tokens than {base.source}, so their log-probabilities can't be compared."
            )
        yield _Other(model, nullcontext, _identity(model, None))


def _identity(base: Base, adapter: Attached | None) -> str:
    parts: dict[str, Any] = {"base": base.fingerprint, "method": None, "tensors": []}
    if adapter is not None:
        parts["method"] = adapter.method.plain()
        parts["tensors"] = [(name, sha256_tensor(tensor)) for name, tensor in sorted(adapter.state().items())]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@functools.cache
def _made_by() -> str:
    """A hash of the code that computes."""
    code = cache.code_hash(trimtab.base, trimtab.core, trimtab.data, trimtab.engine, trimtab.methods)
    return hashlib.sha256(json.dumps([code, versions()], sort_keys=True).encode()).hexdigest()[:16]


def _key(row: TokenRow) -> str:
    """What a row's Σ log p depends on, beside the model."""
    parts = [array("q", numbers).tobytes() for numbers in ([len(row.ids)], row.ids, row.target_indices)]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:32]


@torch.no_grad()
def logprobs(base: Base, rows: Sequence[TokenRow], pack_tokens: int) -> list[float]:
    """Σ log p of each row's learned tokens in the model as it stands."""
    found: dict[int, float] = {}
    # Without their sides: here, a mismatched answer can share its prompt with the row's own.
    rows = [TokenRow(row.ids, row.target_indices, row.where) for row in rows]
    for pack in pack_all(rows, pack_tokens):
        for row, value in zip(pack.rows, pack_logprobs(base.model, pack.to(base.device)).tolist(), strict=True):
            found[id(row)] = value
    return [found[id(row)] for row in rows]


def _read(path: Path) -> dict[str, float]:
    """What is known of rows; nothing if the file is damaged."""
    try:
        held = files.read_json(path)
    except ArtifactError:
        return {}
    if not isinstance(held, dict) or held.get("digest") != _digest(_sorted(held.get("logprobs"))):
        return {}
    with suppress(OSError):
        path.touch()
    return held["logprobs"]


def _write(path: Path, known: dict[str, float]) -> None:
    text = _sorted(known)
    files.write_text(path, f'{{"digest": "{_digest(text)}", "logprobs": {text}}}\n')
    cache.keep_newest(path.parent, "*.json", KEPT)


def _sorted(logprobs: Any) -> str:
    return json.dumps(logprobs, sort_keys=True)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
