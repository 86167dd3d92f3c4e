"""An adapter in words and numbers: the modules that it replaced, and its parameters, derived shape by shape."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import Tensor, nn

from trimtab.core.wrapping import base_modules
from trimtab.methods._matrices import matrix_shape


@dataclass(frozen=True)
class Replaced:
    """Modules that an adapter replaced by layers of its own, alike but for the number of their layer."""

    modules: str
    """Their path, with the numbers as spans: model.layers.[0-27].self_attn.q_proj."""
    count: int
    kind: str
    """The class of the base's own modules."""
    shape: tuple[int, int] | None
    """Their inputs and outputs, if they are matrices."""
    tensors: Mapping[str, tuple[int, ...]]
    """What each of the layers trains."""
    parameters: int
    """Of all of them together; what layers share is counted with the first."""

    @property
    def each(self) -> int:
        """Parameters of one of them, where they share none."""
        return sum(map(math.prod, self.tensors.values()))

    @property
    def formula(self) -> str:
        """How the parameters of one module follow from its shape: 8·(1,536 + 256), or the sizes of what it trains."""
        sizes = [*self.tensors.values()]
        if self.shape is not None and [*self.tensors] == ["A", "B"] and self.each == sizes[0][0] * sum(self.shape):
            return f"{sizes[0][0]}·({self.shape[0]:,} + {self.shape[1]:,})"
        return " + ".join("·".join(f"{n:,}" for n in size) for size in sizes)

    @property
    def sum(self) -> str:
        """The parameters of all of them: 28 · 14,336 = 401,408."""
        shared = self.parameters != self.count * self.each
        return f"{self.parameters:,} shared" if shared else f"{self.count:,} · {self.each:,} = {self.parameters:,}"


class Described:
    """An adapter on a model that says what it is."""

    model: nn.Module
    layers: dict[str, Any]

    def parameters(self) -> Mapping[str, Tensor]:
        raise NotImplementedError

    def replaced(self) -> list[Replaced]:
        """What it replaced in the model; layers that differ in the number of their block alone are together."""
        known, counted = base_modules(self.model), {id(p) for p in self.parameters().values()}
        alike: dict[Any, list[tuple[list[int], int]]] = {}
        for path, layer in self.layers.items():
            own = layer.own_parameters()
            numbers = [int(part) for part in path.split(".") if part.isdigit()]
            pattern = re.sub(r"(?<![^.])\d+(?![^.])", "{}", path)
            sizes = tuple((name, tuple(p.shape)) for name, p in own.items())
            new = {id(p): p.numel() for p in own.values() if id(p) in counted}
            counted -= new.keys()
            shape = matrix_shape(known[path])
            alike.setdefault((pattern, type(known[path]).__name__, shape, sizes), []).append((numbers, sum(new.values())))
        found = []
        for (pattern, kind, shape, sizes), layers in alike.items():
            spans = [_span(sorted(set(column))) for column in zip(*(numbers for numbers, _ in layers), strict=True)]
            found.append(
                Replaced(pattern.format(*spans), len(layers), kind, shape, dict(sizes), sum(count for _, count in layers))
            )
        return found

    def trainable_parameters(self) -> str:
        """The line that PEFT's `print_trainable_parameters` prints: this adapter's parameters, and the model's with all adapters."""
        trained = sum(p.numel() for p in self.parameters().values())
        total = sum(map(_count, self.model.parameters()))
        return f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}"

    def __str__(self) -> str:
        """What was replaced, a line for each kind of module, and the line of `trainable_parameters`."""
        lines = []
        for one in self.replaced():
            shape = f" {one.shape[0]:,}→{one.shape[1]:,}" if one.shape else ""
            lines.append(
                f"{one.modules or '(the whole model)'}: {one.count} × {one.kind}{shape}, {one.formula} each: {one.sum}"
            )
        return "\n".join([*lines, self.trainable_parameters()])


def _count(parameter: Tensor) -> int:
    """The numbers in a parameter; bitsandbytes packs two of four bits into a byte."""
    packed = getattr(parameter, "quant_state", None)
    return parameter.numel() if packed is None else math.prod(packed.shape)


def _span(numbers: list[int]) -> str:
    """0, 1, 2, 3, 7 as [0-3,7]."""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    spans = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return spans[0] if len(numbers) == 1 else f"[{','.join(spans)}]"
