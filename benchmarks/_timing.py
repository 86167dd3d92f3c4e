"""Shared by benchmarks: record when functions start and end, by wrapping them."""

import functools
import importlib
import time
from collections.abc import Mapping
from typing import Any

Marks = list[tuple[str, float, float]]
"""Names, and the seconds at which they began and ended."""


def note(places: Mapping[str, str], marks: Marks) -> None:
    """Replace functions by ones that add to `marks` whenever they are called.

    Args:
        places: By the name to note, MODULE:FUNCTION in the package, or MODULE:CLASS.METHOD.
    """
    for name, place in places.items():
        module, _, path = place.partition(":")
        *owners, attribute = path.split(".")
        owner = functools.reduce(getattr, owners, importlib.import_module(f"trimtab.{module}"))
        setattr(owner, attribute, _noted(name, getattr(owner, attribute), marks))


def _noted(name: str, function: Any, marks: Marks) -> Any:
    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        before = time.time()
        try:
            return function(*arguments, **named)
        finally:
            marks.append((name, before, time.time()))

    return call
