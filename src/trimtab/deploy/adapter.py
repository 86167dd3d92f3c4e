"""Saving an adapter from a model to disk, and loading it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.artifacts import Adapter, read_adapter, write_adapter
from trimtab.base import Base, write_switches, write_tokenizer, writes_dates
from trimtab.core import files
from trimtab.core.errors import ArtifactError, RecipeError, UnsupportedModel
from trimtab.data.example import TokenRow
from trimtab.deploy.hub_adapter import adapter_on_hub
from trimtab.deploy.provenance import adapter_contents, base_model_keys
from trimtab.deploy.save_pretrained import save_adapters_alone
from trimtab.methods import BASE_TENSOR_PREFIX, Attached, Method, Sample, attach_uninitialized, base_modules, require_free_name


def sample(base: Base, rows: Sequence[TokenRow]) -> Sample:
    """What methods initialize adapters from, besides the base model: training examples and the tokenizer."""
    return Sample(rows=[row.ids for row in rows], encode=_encode(base), pieces=base.original_ids)


def _encode(base: Base) -> Callable[[str], list[int]] | None:
    return (lambda text: base.encode([text])[0].ids) if base.tokenizer is not None else None


def save_adapter(
    base: Base, adapter: Attached, folder: Path | str, trained: dict[str, Any] | None = None, *, tokenizer: bool = True
) -> None:
    """Write the adapter as a new folder, which PEFT reads too. Raises StorageError; then there is no folder.

    Args:
        tokenizer: Write the base model's tokenizer beside it, as users of PEFT expect.
    """
    facts = {
        **({"moment": base.moment.isoformat()} if writes_dates(base.tokenizer) else {}),
        "fingerprint": base.fingerprint,
        "stop_ids": list(base.stop_ids) if base.tokenizer is not None else [],
    }
    template = base.tokenizer.chat_template if base.chat_template is not None and base.tokenizer is not None else None
    contents = adapter_contents(adapter, base.config, facts, trained or {}, template)
    write_adapter(Path(folder), contents, write_more=lambda new: _write_tokenizer(base, new) if tokenizer else None)


def _write_tokenizer(base: Base, folder: Path) -> None:
    """Write the tokenizer with the chat template and switches of training into an empty folder, unless there is none that could be."""
    if base.tokenizer is None:
        return
    try:
        write_tokenizer(base.tokenizer, folder, changed=bool(base.added_tokens) or base.chat_template is not None)
    except UnsupportedModel:  # an adapter is complete without it
        for file in folder.rglob("*"):
            if file.is_file():
                files.remove_file(file)
        return
    write_switches(folder, base.template_switches)


def copy_adapter(base: Base, folder: Path, new: Path) -> None:
    """Write a saved adapter again as a new folder, with its base model's present location, and the tokenizer beside it."""
    stored = read_adapter(folder, ours=True)
    named = base_model_keys(base.source) if "base_model_name_or_path" in stored.config else {}
    config = {key: value for key, value in stored.config.items() if key != "revision"} | named
    if "model_name" in config:
        config["model_name"] = base.source
    contents = replace(stored, config=config, base={**stored.base, "model": base.config.plain()})
    write_adapter(new, contents, write_more=lambda folder: _write_tokenizer(base, folder))


def load_adapter(base: Base, folder: Path | str, name: str = "default") -> Attached:
    """Attach a saved adapter, Trimtab's or PEFT's, to a base model. Of several adapters, only the new one is active.

    Args:
        folder: Its folder, or its name on the hub.
        name: Distinguishes it from other adapters on the same model.

    Raises:
        RecipeError: The model has an adapter of that name already.
        ArtifactError: It is damaged, was trained on another base model, needs unsupported features, or its tensors are
            not exactly those of its method on this model. The base model is left unchanged.
    """
    folder = adapter_on_hub(str(folder)) or Path(folder)
    stored = read_adapter(folder)
    if stored.base:
        base.check_is(stored.base["fingerprint"], str(folder))
    require_free_name(base.model, name)
    tokenizer = base.tokenizer
    try:
        method, tensors = read_method(stored)
        tensors = _without_base_tensors(base, tensors)
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
    save_adapters_alone(base.model)
    return adapter


def _without_base_tensors(base: Base, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The adapter's tensors without those of the base model that PEFT saved with them. Raises ArtifactError if those differ here."""
    own = {
        f"{path}.{name}": p
        for path, module in base_modules(base.model).items()
        for name, p in module.named_parameters(recurse=False)
    }
    for key in tensors:
        if key.startswith(BASE_TENSOR_PREFIX):
            name = key.removeprefix(BASE_TENSOR_PREFIX)
            if name not in own or not torch.equal(tensors[key].to(own[name]), own[name]):
                raise ArtifactError(
                    f"it holds the base model's {name} from its training, which differs from this base model's."
                )
    return {key: tensor for key, tensor in tensors.items() if not key.startswith(BASE_TENSOR_PREFIX)}


def _with_paths(tensors: dict[str, Tensor], adapter: Attached) -> dict[str, Tensor]:
    """The tensors by `path.name`; `Method.from_peft` omits the path of a method's only module."""
    only = next(iter(adapter.layers)) if len(adapter.layers) == 1 else ""
    return {name if "." in name or not only else f"{only}.{name}": tensor for name, tensor in tensors.items()}


def read_method(stored: Adapter) -> tuple[Method, dict[str, Tensor]]:
    """The method of a saved adapter, and its tensors by Trimtab's names. Raises ArtifactError or RecipeError."""
    if stored.method is not None:  # it holds more than PEFT's configuration (`all-linear`, for example)
        method = Method.pick(stored.method)
        return method, method.from_peft(stored.config, stored.tensors)[1]
    kind = next((m for m in map(Method.member, Method.names()) if m.recognizes(stored.config)), None)
    if kind is None:
        raise ArtifactError(
            f"Trimtab has no method for PEFT's {stored.config.get('peft_type')}; it has {', '.join(Method.names())}."
        )
    return kind.from_peft(stored.config, stored.tensors)
