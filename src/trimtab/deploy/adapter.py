"""Between an adapter on a model and an adapter on disk."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.artifacts import Adapter, read_adapter, write_adapter
from trimtab.base import Base, writes_dates
from trimtab.core.errors import ArtifactError, RecipeError
from trimtab.data.example import TokenRow
from trimtab.deploy.provenance import as_stored
from trimtab.deploy.save_pretrained import save_alone
from trimtab.methods import BASE_TENSOR_PREFIX, Attached, Method, Sample, attach_uninitialized, base_modules, require_free_name


def sample(base: Base, rows: Sequence[TokenRow]) -> Sample:
    """What an adapter's first values can be made from, beside the base: rows to be learned, and the base's tokenizer."""
    return Sample(rows=[row.ids for row in rows], encode=_encode(base), pieces=base.original_ids)


def _encode(base: Base) -> Callable[[str], list[int]] | None:
    return (lambda text: base.encode([text])[0].ids) if base.tokenizer is not None else None


def save_adapter(base: Base, adapter: Attached, folder: Path | str, trained: dict[str, Any] | None = None) -> None:
    """Write the adapter as a new folder that PEFT reads too. Raises StorageError; then there is no folder."""
    facts = {
        **({"moment": base.moment.isoformat()} if writes_dates(base.tokenizer) else {}),
        "fingerprint": base.fingerprint,
        "stop_ids": list(base.stop_ids) if base.tokenizer is not None else [],
    }
    write_adapter(Path(folder), as_stored(adapter, base.config, facts, trained or {}))


def keep_adapter(base: Base, folder: Path, new: Path) -> None:
    """Write an adapter that was saved by us once more, as a new folder; its base may have moved meanwhile."""
    stored = read_adapter(folder, ours=True)
    config = {key: base.source if key in ("base_model_name_or_path", "model_name") else v for key, v in stored.config.items()}
    write_adapter(new, replace(stored, config=config, base={**stored.base, "model": base.config.plain()}))


def load_adapter(base: Base, folder: Path | str, name: str = "default") -> Attached:
    """Put a saved adapter, ours or PEFT's, on a base. Of several adapters, only the new one is switched on.

    Args:
        name: What to call it among others on the same base.

    Raises:
        RecipeError: The base has an adapter of that name already.
        ArtifactError: It is damaged, was trained on another base, asks for what Trimtab does not do, or its tensors are
            not exactly those of its method on this model. The base is left as it was.
    """
    folder = Path(folder)
    stored = read_adapter(folder)
    if stored.base:
        base.check_is(stored.base["fingerprint"], str(folder))
    require_free_name(base.model, name)
    tokenizer = base.tokenizer
    try:
        method, tensors = read_method(stored)
        tensors = _without_bases_own(base, tensors)
        base.add_tokens(method.new_tokens)
        adapter = attach_uninitialized(base.model, method.resolve_tokens(_encode(base)), seed=0, name=name)
    except (RecipeError, ArtifactError) as error:
        base.tokenizer = tokenizer
        raise ArtifactError(f"{folder}: {error}") from None
    try:
        adapter.load_state(_with_paths(tensors, adapter))
    except ArtifactError as error:
        adapter.detach()
        base.tokenizer = tokenizer
        raise ArtifactError(f"{folder}: {error}") from None
    save_alone(base.model)
    return adapter


def _without_bases_own(base: Base, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The adapter's tensors, if those of the base that PEFT has saved beside them are this base's too. Raises ArtifactError."""
    own = {
        f"{path}.{name}": p
        for path, module in base_modules(base.model).items()
        for name, p in module.named_parameters(recurse=False)
    }
    for key in tensors:
        mine = own.get(key.removeprefix(BASE_TENSOR_PREFIX)) if key.startswith(BASE_TENSOR_PREFIX) else None
        saved = tensors[key].to(mine) if mine is not None else tensors[key]
        if key.startswith(BASE_TENSOR_PREFIX) and (mine is None or not torch.equal(saved, mine)):
            raise ArtifactError(
                f"it holds the base's {key.removeprefix(BASE_TENSOR_PREFIX)} as it was where the adapter was trained, and this base has another."
            )
    return {key: tensor for key, tensor in tensors.items() if not key.startswith(BASE_TENSOR_PREFIX)}


def _with_paths(tensors: dict[str, Tensor], adapter: Attached) -> dict[str, Tensor]:
    """By `path.name`, where the only module of a method was left unsaid (`Method.from_peft`)."""
    only = next(iter(adapter.layers)) if len(adapter.layers) == 1 else ""
    return {name if "." in name or not only else f"{only}.{name}": tensor for name, tensor in tensors.items()}


def read_method(stored: Adapter) -> tuple[Method, dict[str, Tensor]]:
    """The method of an adapter on disk, and its tensors by our names. Raises ArtifactError, RecipeError."""
    if stored.method is not None:  # our own words say more than PEFT's (`all-linear`, say)
        method = Method.pick(stored.method)
        return method, method.from_peft(stored.config, stored.tensors)[1]
    found = next((m for m in map(Method.member, Method.names()) if m.recognizes(stored.config)), None)
    if found is None:
        raise ArtifactError(
            f"Trimtab has no method for PEFT's {stored.config.get('peft_type')}; it has {', '.join(Method.names())}."
        )
    return found.from_peft(stored.config, stored.tensors)
