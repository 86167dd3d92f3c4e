"""The reference model of a preference objective: its log-probabilities, computed once and cached, and the divergence from it."""

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
from trimtab.core.processes import processes
from trimtab.core.wrapping import whole_tensor
from trimtab.data import pack_all
from trimtab.data.example import TokenRow
from trimtab.deploy import adapter_folder, load_adapter, versions
from trimtab.engine import PackCost, ensure_exact, pack_divergences, pack_logprobs
from trimtab.methods import Attached, activate, active, adapters

PACK_TOKENS = 4096
"""Tokens per pack where no backward pass follows: large enough to share long prompts."""
MAX_CACHED = 64
"""How many references the cache holds; the least recently used is evicted first."""
TOLERANCE = (1e-3, 2e-5)
"""By how much Σ log p of a row may differ between packs in float32: absolute, in nats, and relative."""
HALF_TOLERANCE = (0.5, 2e-2)
"""The same in bfloat16 and float16."""


@dataclass
class ReferencedRows:
    """Rows with the reference's log-probabilities."""

    rows: list[TokenRow]
    facts: dict[str, Any]
    """The run's record of its reference, as JSON data."""


def add_reference_logprobs(
    base: Base, adapter: Attached, reference: str, rows: Sequence[TokenRow], pack_tokens: int
) -> ReferencedRows:
    """Rows with Σ log p of their target tokens under the reference, from the cache where it has them.

    Args:
        adapter: The adapter to be trained, as it is when training starts.
        reference: The objective's `reference`.

    Raises:
        RecipeError: There is no such model, or it has another tokenizer.
        NonFinite: The reference gives a row a log-probability that is NaN or Inf.
    """
    kind = ("start" if adapter.trained else "base") if reference == "auto" else reference
    if kind == "start" and not adapter.trained and adapter.method.identity_at_init:
        kind = "base"
    with _open(base, adapter, kind) as model:
        path = cache.cache_folder() / "reference" / f"{model.identity}-{_code_version()}.json"
        known = processes.told_by_first(lambda: _read(path))
        keys = [_key(row) for row in rows]
        missing = {key: row for key, row in zip(keys, rows, strict=True) if key not in known}
        if missing:
            with model.active():
                values = logprobs(model.base, list(missing.values()), pack_tokens)
            for row, value in zip(missing.values(), values, strict=True):
                if not math.isfinite(value):
                    raise NonFinite(
                        f"{row.where}: the reference model gives it a log-probability of {value}: its weights are broken."
                    )
            known |= dict(zip(missing, values, strict=True))
            with suppress(StorageError, OSError):
                if processes.first_here:
                    _write(path, known)
    facts = {"kind": kind, "identity": model.identity, "rows": len(set(keys)), "computed": len(missing)}
    return ReferencedRows([replace(row, reference=known[key]) for row, key in zip(rows, keys, strict=True)], facts)


def check_start(base: Base, rows: Sequence[TokenRow], pack_tokens: int) -> float:
    """Check that training starts from the reference, and return the largest difference of Σ log p on these rows.

    So DPO starts with margins of 0 and a loss of ln 2.

    Raises:
        WrongReference: The difference exceeds rounding.
    """
    absolute, relative = logprob_tolerance(base)
    largest = 0.0
    for row, logprob in zip(rows, logprobs(base, rows, pack_tokens), strict=True):
        difference = abs(logprob - row.reference)
        largest = max(largest, difference)
        if not difference <= absolute + relative * abs(row.reference):
            raise WrongReference(
                f"{row.where}: the model that training starts from gives its answer log p = {logprob:.6g}, and the reference "
                f"{row.reference:.6g}, where they should be equal. The reference is not the model that training starts from: name the "
                f"right one with objective.reference, or empty {cache.cache_folder() / 'reference'} if it is damaged."
            )
    return largest


def logprob_tolerance(base: Base) -> tuple[float, float]:
    """The absolute (in nats) and relative tolerance between two computations of Σ log p of a row."""
    frozen = next(parameter for parameter in base.model.parameters() if not parameter.requires_grad)  # not a copy in float32
    half = frozen.dtype in (torch.bfloat16, torch.float16) or base.quantization != "none"
    return HALF_TOLERANCE if half else TOLERANCE


@torch.no_grad()
def divergence(base: Base, adapter: Attached, kind: str, rows: Sequence[TokenRow], pack_tokens: int) -> float:
    """KL(π ‖ π_reference) in nats per token, the mean over the target tokens of the rows.

    It is exact: computed from whole distributions over the vocabulary, given the tokens before each target.

    Args:
        kind: `base`, an adapter or run folder, or a model.
    """
    ensure_exact(base.model, rows)
    with _open(base, adapter, kind) as reference:
        packs, models = pack_all(rows, pack_tokens), (base.model, reference.base.model, reference.active)
        costs = list(map(PackCost(base.model), packs))
        values = processes.each(costs, lambda number: pack_divergences(*models, packs[number].to(base.device)))
    return sum(float(of_pack.double().sum()) for of_pack in values) / max(1, sum(map(len, values)))


class _ReferenceModel(NamedTuple):
    """An opened reference."""

    base: Base
    active: Callable[[], AbstractContextManager[None]]
    """Within this block, the base model computes as the reference; outside, as the model that is trained."""
    identity: str
    """A hash of everything that determines its log-probabilities."""


@contextmanager
def _open(base: Base, adapter: Attached, kind: str) -> Iterator[_ReferenceModel]:
    """Open a reference, and close it after the block."""
    if kind == "base":
        yield _ReferenceModel(base, adapter.disabled, _identity(base, None))
    elif kind == "start":
        yield _ReferenceModel(base, nullcontext, _identity(base, adapter))
    elif (folder := adapter_folder(kind)) is not None:
        try:
            loaded = load_adapter(base, folder, name="reference")
        except ArtifactError as error:
            raise RecipeError(f"objective.reference: {error}") from None
        if adapter.name in adapters(base.model):
            activate(base.model, adapter.name)
        try:
            yield _ReferenceModel(base, lambda: active(base.model, "reference"), _identity(base, loaded))
        finally:
            loaded.detach()
    else:
        model = Base.load(
            base.config.model_copy(update={"name": kind, "template": {}, "chat_template": None})
        )  # in the dtype and quantization of the policy
        if model.fingerprint["tokenizer"] != base.fingerprint["tokenizer"]:
            raise RecipeError(
                f"objective.reference: {kind} has another tokenizer than {base.source}, so their log-probabilities can't be compared."
            )
        yield _ReferenceModel(model, nullcontext, _identity(model, None))


def _identity(base: Base, adapter: Attached | None) -> str:
    parts: dict[str, Any] = {"base": base.fingerprint, "method": None, "tensors": []}
    if adapter is not None:
        parts["method"] = adapter.method.plain()
        parts["tensors"] = [(name, sha256_tensor(whole_tensor(p))) for name, p in sorted(adapter.parameters().items())]
    return files.json_digest(parts)


@functools.cache
def _code_version() -> str:
    """A hash of the code and of the library versions that compute log-probabilities."""
    code = cache.code_hash(trimtab.base, trimtab.core, trimtab.data, trimtab.engine, trimtab.methods)
    return files.json_digest([code, versions()])[:16]


def _key(row: TokenRow) -> str:
    """A hash of what a row's Σ log p depends on, besides the model."""
    parts = [array("q", numbers).tobytes() for numbers in ([len(row.ids)], row.ids, row.target_indices)]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:32]


@torch.no_grad()
def logprobs(base: Base, rows: Sequence[TokenRow], pack_tokens: int) -> list[float]:
    """Σ log p of each row's target tokens under the model with its active adapters."""
    ensure_exact(base.model, rows)
    by_row: dict[int, float] = {}
    # Without their sides, so that a mismatched answer can share its prompt with the row's own.
    rows = [TokenRow(row.ids, row.target_indices, row.where) for row in rows]
    packs = pack_all(rows, pack_tokens)
    costs = list(map(PackCost(base.model), packs))
    computed = processes.each(costs, lambda number: pack_logprobs(base.model, packs[number].to(base.device)))
    for pack, logprobs in zip(packs, computed, strict=True):
        by_row |= {id(row): value for row, value in zip(pack.rows, logprobs.tolist(), strict=True)}
    return [by_row[id(row)] for row in rows]


def _read(path: Path) -> dict[str, float]:
    """The cached log-probabilities by key; none if the file is missing or damaged."""
    try:
        content = files.read_json(path)
    except ArtifactError:
        return {}
    if not isinstance(content, dict) or content.get("digest") != files.json_digest(content.get("logprobs")):
        return {}
    with suppress(OSError):
        path.touch()  # recently used
    return content["logprobs"]


def _write(path: Path, known: dict[str, float]) -> None:
    files.write_text(path, json.dumps({"digest": files.json_digest(known), "logprobs": known}))
    cache.keep_newest(path.parent, "*.json", MAX_CACHED)
