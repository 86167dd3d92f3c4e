"""What is written of an adapter, and what of the versions that made it."""

import platform
from importlib import metadata
from typing import Any

from trimtab.adapted import look_through
from trimtab.artifacts import Adapter
from trimtab.methods import Attached

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


def as_stored(adapter: Attached, source: str, facts: dict[str, Any], trained: dict[str, Any]) -> Adapter:
    """The content of an adapter's folder. `facts` are of its base, whose name is `source`."""
    method, own = adapter.folded()
    config, tensors = method.to_peft(adapter.model, own)
    embeddings: Any = adapter.model.get_input_embeddings()  # type: ignore[operator]
    dtype = str(look_through(embeddings).weight.dtype).removeprefix("torch.")
    return Adapter(
        config={"base_model_name_or_path": source, **config},
        tensors=tensors,
        method=method.plain(),
        base={"source": source, "dtype": dtype, **facts},
        trained=trained,
        versions=versions(),
    )
