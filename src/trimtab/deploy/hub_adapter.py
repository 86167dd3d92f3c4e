"""Adapters on the Hugging Face hub, by name: `org/adapter`, or `org/adapter@revision`. Only safetensors and texts are downloaded."""

from pathlib import Path

from trimtab.artifacts import is_adapter
from trimtab.artifacts.adapter import CONFIG, HUB_PICKLE, HUB_WEIGHTS, PEFT_PICKLE, PEFT_WEIGHTS
from trimtab.base.locate import check_hub
from trimtab.core import hub
from trimtab.core.errors import ArtifactError
from trimtab.deploy import hub_client

_PATTERNS = (PEFT_WEIGHTS, HUB_WEIGHTS, "*.json", "*.jinja", "*.txt", "*.model")
"""The files of an adapter's folder, its tokenizer's included: a manifest lists these, too."""


def adapter_on_hub(name: str) -> Path | None:
    """The folder of an adapter on the hub, downloaded into the hub's cache; None for any other name.

    Where the hub can't be reached, the cache is used as it is.

    Raises:
        ArtifactError: Its weights are missing, or a pickle.
        StorageError: It can't be downloaded, or nothing is known about a repository of this name.
        RecipeError: The hub refuses to give it.
    """
    if not hub.names_hub(name) or (known := hub.cached_file(name, CONFIG)) is False:
        return None
    offline = hub.unreachable() is not None
    if offline and known is None:
        check_hub(name)  # a model in the cache, or nothing
        return None
    if not offline and not hub_client.has_file(name, CONFIG):
        return None
    folder = hub_client.download(name, _PATTERNS, cached=offline)
    if is_adapter(folder) and not any((folder / weights).exists() for weights in (PEFT_WEIGHTS, HUB_WEIGHTS)):
        pickles = {PEFT_PICKLE, HUB_PICKLE}.intersection([] if offline else hub_client.file_names(name))
        why = (
            f"it has {min(pickles)}, a pickle, which is never read: ask for it as safetensors"
            if pickles
            else "it is incomplete"
        )
        raise ArtifactError(f"{name}: the adapter on the hub holds no {PEFT_WEIGHTS}: {why}.")
    return folder


def pinned_name(folder: Path) -> str | None:
    """The name and commit of an adapter that was downloaded from the hub; None for any other folder."""
    found = hub.cached_name(folder)
    return f"{found.repository}@{found.revision}" if found else None
