"""The content of an adapter's folder, library versions included."""

import platform
from functools import cache
from importlib import metadata
from typing import Any

from trimtab.artifacts import Adapter
from trimtab.base import ModelConfig
from trimtab.core.hub import parse_hub_name
from trimtab.methods import Attached

PACKAGES = ("trimtab", "torch", "transformers", "tokenizers", "safetensors")


def versions() -> dict[str, str]:
    """The versions of Python and of the libraries that an adapter's results depend on."""
    return {"python": platform.python_version(), **{package: _version(package) for package in PACKAGES}}


@cache
def _version(package: str) -> str:
    """Read once: it takes milliseconds, and every checkpoint and every page asks."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed as a package"


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
