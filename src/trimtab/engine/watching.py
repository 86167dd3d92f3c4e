"""Watch the forward pass of a decoder layer: the modules that it calls, and what goes into them and comes out."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trimtab.core.attention import Rules
from trimtab.methods import unwrap

CLOSE = 1e-5
"""Of the largest number in a row: what float32 may differ by, in another order of sums."""
SUM = 2e-6
"""The same for a single sum."""


class UnknownStructure(Exception):
    """The layer does something that this file does not know; the message says what."""


class Call(NamedTuple):
    """A call of a module."""

    name: str
    """Of the attribute that holds it."""
    module: nn.Module
    """Without adapters."""
    x: Tensor
    """What it was called with."""
    x_name: str | None
    """The keyword by which; None if by position."""
    others: int
    """Other arguments by position."""
    kwargs: Mapping[str, Any]
    y: Tensor
    """What it returned, or the first of it."""


class Attended(NamedTuple):
    """A call of the attention interface, without the batch: H T K, G T K, T H·K."""

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    rules: Rules
    out: Tensor


class Watched(NamedTuple):
    """One forward pass of a layer."""

    layer: nn.Module
    x: Tensor
    kwargs: Mapping[str, Any]
    calls: Mapping[str, Sequence[Call]]
    """Of the layer's own modules (""), and of those in each of them, by its name."""
    attended: Sequence[Attended]
    result: Any
    shares: bool
    """It hands keys and values on to later layers."""


@contextmanager
def watching(layer: nn.Module) -> Iterator[Mapping[str, list[Call]]]:
    """The calls of the layer's modules, and of those in them, within the block."""
    calls: dict[str, list[Call]] = {"": []}
    handles = []
    for name, child in layer.named_children():
        calls[name] = []
        for owner, inner_name, inner in (("", name, child), *((name, n, m) for n, m in unwrap(child).named_children())):
            module = unwrap(inner)
            if not isinstance(module, nn.Dropout | nn.Identity):
                hook = partial(_record, calls[owner], inner_name)
                handles.append(module.register_forward_hook(hook, with_kwargs=True))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _record(calls: list[Call], name: str, module: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> None:
    x_name = None if args else next((key for key, value in kwargs.items() if isinstance(value, Tensor)), None)
    x = args[0] if args else kwargs[x_name] if x_name else None
    y = out[0] if isinstance(out, tuple) else out
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        others = {key: value for key, value in kwargs.items() if key != x_name}
        calls.append(Call(name, module, x, x_name, len(args[1:]), others, y))
    else:
        calls.append(Call(name, module, torch.empty(0), None, 1, {}, torch.empty(0)))


def alike(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether each row of a is that of b, but for rounding."""
    if a.shape != b.shape:
        return False
    return bool(((a - b).abs().amax(-1) <= tolerance * b.abs().amax(-1)).all())


def is_norm(module: nn.Module) -> bool:
    return not any(True for _ in module.children()) and all(parameter.ndim <= 1 for parameter in module.parameters())


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)
