"""What the check of a model has found out about how its packed passes have to run."""

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary


@dataclass
class PassMode:
    """How a model's packed passes run."""

    materialized: bool = False
    """It computes with its masks (an indexer, masks with learned numbers), so it gets them as tensors, of T² numbers."""
    caches: bool = True
    """It can continue from a key-value cache; otherwise each new token takes a pass over the whole row."""
    head_scale: float | None = None
    """The factor between the head's matrix times the trunk's hidden states and the logits, before a cap; None if not measured."""
    row_limit: int | None = None
    """Tokens up to which its rows are exact: what an indexer chooses from longer ones depends on the whole pack."""
    checked: bool = False


_modes: WeakKeyDictionary[Any, PassMode] = WeakKeyDictionary()


def mode_of(model: Any) -> PassMode:
    return _modes.setdefault(model, PassMode())
