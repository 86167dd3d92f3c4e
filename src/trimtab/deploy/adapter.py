"""Between an adapter on a model and an adapter on disk."""

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from trimtab.artifacts import Adapter, read_adapter, write_adapter
from trimtab.base import Base
from trimtab.errors import ArtifactError, RecipeError
from trimtab.methods import Attached, Method, attach, refuse_second

PACKAGES = ("trimtab", "torch", "transformers", "tokenizers", "safetensors")


def versions() -> dict[str, str]:
    """Of everything that decides what an adapter computes."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


def save_adapter(base: Base, adapter: Attached, folder: Path | str, trained: dict[str, Any] | None = None) -> None:
    """Write the adapter as a new folder that PEFT reads too. Raises StorageError; then there is no folder."""
    config, tensors = adapter.method.to_peft(base.model, adapter.state())
    facts = {
        "source": base.source,
        "dtype": str(next(base.model.get_input_embeddings().parameters()).dtype).removeprefix("torch."),
        "fingerprint": base.fingerprint,
        "stop_ids": list(base.stop_ids) if base.tokenizer is not None else [],
    }
    write_adapter(
        Path(folder),
        Adapter(
            config={"base_model_name_or_path": base.source, **config},
            tensors=tensors,
            method=adapter.method.plain(),
            base=facts,
            trained=trained or {},
            versions=versions(),
        ),
    )


def load_adapter(base: Base, folder: Path | str) -> Attached:
    """Put a saved adapter, ours or PEFT's, on a base.

    Raises:
        ArtifactError: It is damaged, was trained on another base, asks for what Trimtab does not do, or its tensors are
            not exactly those of its method on this model. The model is left as it was.
    """
    folder = Path(folder)
    stored = read_adapter(folder)
    if stored.base:
        base.check_is(stored.base["fingerprint"], str(folder))
    refuse_second(base.model)
    kind = stored.config["peft_type"]
    found = next((m for m in map(Method.member, Method.names()) if m.peft_type == kind), None)
    if found is None:
        raise ArtifactError(f"{folder}: Trimtab has no method for PEFT's {kind}; it has {', '.join(Method.names())}.")
    try:
        method, tensors = found.from_peft(stored.config, stored.tensors)
        if stored.method is not None:  # our own words say more than PEFT's (`all-linear`, say)
            method = Method.pick(stored.method)
        adapter = attach(base.model, method)
    except (RecipeError, ArtifactError) as error:
        raise ArtifactError(f"{folder}: {error}") from None
    try:
        adapter.load_state(tensors)
    except ArtifactError as error:
        adapter.detach()
        raise ArtifactError(f"{folder}: {error}") from None
    return adapter
