"""What is known about a base model beside its weights: its name on the hub, licence and languages, by its card."""

from pathlib import Path
from typing import Any, NamedTuple

from trimtab.base.loading import find_file
from trimtab.base.locate import EMBEDDED
from trimtab.core import files, hub
from trimtab.deploy import hub_client

EMBEDDED_ON_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The model that the embedded one is a quantized copy of."""
_LICENCE = ("license", "license_name", "license_link")
CARD = "README.md"


class BaseFacts(NamedTuple):
    """For a model card."""

    hub_name: str | None
    """Its name on the hub, without a revision; None if it is not known to be there."""
    revision: str | None = None
    licence: dict[str, Any] = {}  # noqa: RUF012 (never changed)
    """`license`, and of an own licence `license_name` and `license_link`; empty if its card does not say."""
    language: Any = None


def base_facts(source: str, on_hub: str | None = None, *, online: bool = False) -> BaseFacts:
    """What is known about the base model of a name.

    Args:
        on_hub: Its name on the hub, where the user says it.
        online: Ask the hub for its card, if it is not in the cache.
    """
    path = files.expand_user(source)
    if on_hub is None and source == EMBEDDED and not path.exists():
        return BaseFacts(EMBEDDED_ON_HUB, None, {"license": "apache-2.0"}, "en")
    found = hub.parse_hub_name(on_hub) if on_hub else hub.cached_name(path.absolute()) if path.exists() else None
    if found is None and hub.names_hub(source):
        found = hub.parse_hub_name(source)
    card = _card_metadata(path, f"{found.repository}@{found.revision or 'main'}" if found else None, online)
    licence = {key: str(card[key]) for key in _LICENCE if isinstance(card.get(key), str)}
    licence = licence if "license" in licence else {}
    name, revision = (found.repository, found.revision) if found else (None, None)
    return BaseFacts(name, revision, licence, card.get("language"))


def _card_metadata(folder: Path, name: str | None, online: bool) -> dict[str, Any]:
    """The metadata of a model's card, in its folder, the hub's cache, or on the hub; empty if there is none that can be read."""
    from huggingface_hub import ModelCard

    file = folder / CARD if (folder / CARD).is_file() else find_file(name, CARD) if name else None
    if file is None and name and online and hub.unreachable() is None and hub_client.has_file(name, CARD):
        file = find_file(name, CARD)
    if file is None:
        return {}
    try:
        card = ModelCard(file.read_text(encoding="utf-8"), ignore_metadata_errors=True)
    except Exception:  # the card is anybody's text
        return {}
    return dict(card.data.to_dict())
