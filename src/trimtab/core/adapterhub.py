"""Whether an `adapter_config.json` is the `adapters` library's (AdapterHub) or PEFT's."""

from collections.abc import Mapping
from typing import Any


def is_adapterhub_config(config: Mapping[str, Any]) -> bool:
    """The `adapters` library writes its own version, PEFT a `peft_type`."""
    return str(config.get("version", "")).startswith("adapters.")
