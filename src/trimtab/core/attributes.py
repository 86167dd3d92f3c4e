"""Attributes of objects set within a block, and restored at its end."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

_ABSENT = object()


@contextmanager
def attributes_set(changes: Iterable[tuple[Any, str, Any]]) -> Iterator[None]:
    """Within the block, each (object, attribute, value) holds; afterwards the values before it do, whatever ended the block."""
    changes = list(changes)
    before = [(holder, name, getattr(holder, name, _ABSENT)) for holder, name, _ in changes]
    try:
        for holder, name, value in changes:
            setattr(holder, name, value)
        yield
    finally:
        for holder, name, value in before:
            delattr(holder, name) if value is _ABSENT else setattr(holder, name, value)
