"""Which of a model's layers a method adapts: `layers`, and the number of the layer that a module is in."""

import re
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from torch import nn

from trimtab.core.errors import NoSuchModule, UnsupportedModel
from trimtab.core.wrapping import text_modules

_RANGE = re.compile(r"(\d+)(-(\d*))?")


def _check(raw: Any) -> Any:
    """One text, whatever the notation: numbers and ranges in order, each layer once."""
    if raw is None:
        return raw
    parts = raw if isinstance(raw, list | tuple) else raw.split(",") if isinstance(raw, str) else [raw]
    texts = [str(part).strip() for part in parts if not isinstance(part, bool)]
    matches = [_RANGE.fullmatch(text) for text in texts]
    if not texts or len(texts) < len(parts) or not all(matches):
        raise ValueError("expected numbers of layers from 0 on, and ranges of them: 16-31, 24- (to the last), or 0, 1, 30.")
    ranges = sorted((int(m[1]), int(m[1]) if m[2] is None else int(m[3]) if m[3] else None) for m in matches if m)
    for first, last in ranges:
        if last is not None and last < first:
            raise ValueError(f"{first}-{last} is an empty range: write {last}-{first}.")
    return ", ".join(_merged(ranges))


def _merged(ranges: list[tuple[int, int | None]]) -> Iterable[str]:
    """Ranges in order, those that touch joined, as texts; None as the end is the last layer."""
    joined: list[tuple[int, int | None]] = []
    for first, last in ranges:
        before = joined[-1] if joined else None
        if before is not None and (before[1] is None or first <= before[1] + 1):
            joined[-1] = before[0], None if before[1] is None or last is None else max(before[1], last)
        else:
            joined.append((first, last))
    return [f"{a}-" if b is None else str(a) if a == b else f"{a}-{b}" for a, b in joined]


Layers = Annotated[
    str | None,
    BeforeValidator(_check),
    Field(description="Which of the model's layers, counted from 0: `16-31`, `24-` (to the last), `0, 1, 30`, or a list; all unless given."),
]  # fmt: skip
"""A hyperparameter that holds numbers of layers."""


def layer_numbers(layers: str, count: int) -> list[int]:
    """The numbers that `layers` means in a model of so many layers. Raises NoSuchModule for one that it does not have."""
    numbers: list[int] = []
    for part in layers.split(", "):
        first, dash, last = part.partition("-")
        numbers += range(int(first), (int(last) if last else count - 1 if dash else int(first)) + 1)
        if int(first) >= count or numbers[-1] >= count:
            raise NoSuchModule(f"layers: the model has {count} layers, 0 to {count - 1}, and {part} is not among them.")
    return numbers


def within_layers(model: Any, layers: str | None, paths: Iterable[str], asked: str) -> list[str]:
    """Those of the paths that are inside these layers, in their order; all of them if `layers` is None.

    Raises:
        NoSuchModule: There is no such layer; or none of the paths is inside, which begins with what was asked for.
    """
    if layers is None:
        return list(dict.fromkeys(paths))
    parent, count = stack_of_layers(model)
    inside = tuple(f"{parent}.{number}." for number in layer_numbers(layers, count))
    if found := [path for path in dict.fromkeys(paths) if path.startswith(inside)]:
        return found
    raise NoSuchModule(f"{asked} is in none of the layers {layers}, which are all that `layers` adapts.")


def stack_of_layers(model: Any) -> tuple[str, int]:
    """The path of the list that holds the model's layers, and how many there are.

    Raises:
        UnsupportedModel: It is not clear which list that is.
    """
    own, count = text_modules(model), model.config.get_text_config().num_hidden_layers
    lists = [path for path, module in own.items() if isinstance(module, nn.ModuleList) and len(module) == count]
    outer = [path for path in lists if not any(path.startswith(f"{parent}.") for parent in lists)]  # experts may be a list too
    if len(outer) != 1:
        raise UnsupportedModel(
            f"{type(model).__name__} has {count} layers by its configuration, and {len(outer) or 'no'} lists of so many modules"
            f"{' (' + ', '.join(outer) + ')' if outer else ''}, so which are its blocks is not clear."
        )
    return outer[0], count
