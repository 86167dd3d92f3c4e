"""The content of an adapter's folder, library versions included."""

import platform
from importlib import metadata
from typing import Any

from trimtab.artifacts import Adapter
from trimtab.base import ModelConfig
from trimtab.core.hub import parse_hub_name
from trimtab.methods import Attached

PACKAGES = ("trimtab", "torch", "transformers", "tokenizers", "safetensors")


def versions() -> dict[str, str]:
    """The versions of Python and of the libraries that an adapter's results depend on."""
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            installed[package] = "not installed as a package"
    return installed


def adapter_contents(
    adapter: Attached,
    model: ModelConfig,
    facts: dict[str, Any],
    trained: dict[str, Any],
    chat_template: str | dict[str, str] | None = None,
) -> Adapter:
    """The content of an adapter's folder. `model` is its base model's configuration, and `facts` what else to store about that."""
    method, own = adapter.to_inference_form()
    config, tensors = method.to_peft(adapter.model, own)
    return Adapter(
        config={**base_model_keys(model.name), **config},
        tensors=tensors,
        method=method.plain(),
        base={"model": model.plain(), **facts},
        trained=trained,
        versions=versions(),
        chat_template=chat_template,
    )


def base_model_keys(name: str) -> dict[str, Any]:
    """The keys by which PEFT's configuration names the base model, a revision apart from the rest."""
    hub = parse_hub_name(name)
    return {"base_model_name_or_path": hub.repository, **hub.arguments}
