"""What is written of an adapter, and what of the versions that made it."""

import platform
from importlib import metadata
from typing import Any

from trimtab.artifacts import Adapter
from trimtab.base import ModelConfig
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


def as_stored(adapter: Attached, held: ModelConfig, facts: dict[str, Any], trained: dict[str, Any]) -> Adapter:
    """The content of an adapter's folder. `held` says which base it is on, and how that is held; `facts` what else there is of it."""
    method, own = adapter.to_inference_form()
    config, tensors = method.to_peft(adapter.model, own)
    return Adapter(
        config={"base_model_name_or_path": held.name, **config},
        tensors=tensors,
        method=method.plain(),
        base={"model": held.plain(), **facts},
        trained=trained,
        versions=versions(),
    )
