"""Merging on a model in memory: a twin of each adapted module computes with the sum of its weights and the adapter's change.

The base's own weights stay where they are, untouched: unmerging restores every bit, and whatever asks for the base meanwhile (its
fingerprint, a saved adapter, the adapter switched off, another adapter around this one) gets it as it is.
"""

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from trimtab.core.errors import ArtifactError, NotMergeable, RecipeError
from trimtab.core.wrapping import Wrapper, unwrap
from trimtab.methods._switch import Switch


class MergeableLayer(Wrapper):
    """A layer around a base module that may have a twin of that module with the change in its weights."""

    switch: Switch

    def __init__(self) -> None:
        super().__init__()
        self._twin: tuple[nn.Module, ...] = ()  # in a tuple, so that it is no module of this one: it is not saved or counted

    @property
    def is_merged(self) -> bool:
        return bool(self._twin)

    def set_twin(self, twin: nn.Module | None) -> None:
        """Compute with this module from now on, or with None as before."""
        self._twin = () if twin is None else (twin,)

    def twin(self) -> nn.Module | None:
        """The module to compute with while the adapter acts, if it is merged and no adapter under it acts, too."""
        inner = self.base
        while self._twin and isinstance(inner, MergeableLayer):
            if inner.switch.state:
                return None
            inner = inner.base
        return self._twin[0] if self._twin else None

    def without_twin(self) -> Self:
        """A shallow copy that computes from the adapter's parameters."""
        other = copy.copy(self)
        other.set_twin(None)
        return other

    def train(self, mode: bool = True) -> "MergeableLayer":
        if mode and self.is_merged:
            raise RecipeError(
                "A merged adapter computes with fixed weights, so it cannot be trained. Unmerge it first (unmerge)."
            )
        super().train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MergeableLayer":
        """The twin goes to another device or dtype with the layer."""
        super()._apply(fn, recurse)
        for twin in self._twin:
            twin._apply(fn)
        return self


class MergeableAdapter:
    """An adapter on a model that may compute with merged weights."""

    method: Any
    layers: dict[str, Any]

    @property
    def merged(self) -> bool:
        """Whether the model computes with merged weights while this adapter acts."""
        return any(layer.is_merged for layer in self.layers.values())

    def merge(self) -> float:
        """Let the model compute with the sum of its weights and the adapter's change, as they are now; `unmerge` restores every bit.

        The base's own weights are kept beside the sums, so that everything else stays true: the adapter can be switched off, saved or
        taken off, and others attached. It cannot be trained or loaded. Where an adapter under it acts as well, it acts unmerged.

        Returns:
            The share of the adapter's change left after rounding to the base's dtype: 1 in float32, but for rounding.

        Raises:
            NotMergeable: The method is not a change of weights, or the base is quantized. Then nothing is merged.
            ArtifactError: The adapter holds NaN or Inf, or a sum overflows the base's dtype. Then nothing is merged.
        """
        if not self.method.mergeable:
            raise NotMergeable(
                f"{self.method.name} is not a change of weights, so it cannot be merged. Use the adapter as it is, beside the base."
            )
        return _merge(self.layers)

    def unmerge(self) -> None:
        """Compute with the base's own weights and the adapter beside them again, as before `merge`, to the last bit."""
        for layer in self.layers.values():
            layer.set_twin(None)


@torch.no_grad()
def _merge(layers: Mapping[str, Any]) -> float:
    """Give each layer its twin; all or none. Returns the share of the change that is left after rounding to the base's dtype.

    New tokens' rows stay beside the base's table, which they would make longer.

    Raises:
        NotMergeable: The method is not a change of weights, there is nothing but new tokens, or the base is quantized.
        ArtifactError: The adapter holds NaN or Inf, or a sum overflows the base's dtype.
    """
    twins: dict[str, nn.Module] = {}
    change = lost = 0.0
    for path, layer in layers.items():
        own = dict(unwrap(layer).named_parameters(recurse=False))
        if not all(weight.is_floating_point() for weight in own.values()):
            raise NotMergeable(
                f"{path} is quantized: its sum with the adapter would have to be quantized again, which loses much of the adapter. "
                "Use the adapter as it is, or load the base without quantize."
            )
        if broken := next((name for name, p in layer.own_parameters().items() if not bool(p.isfinite().all())), None):
            raise ArtifactError(f"The adapter's {path}.{broken} holds NaN or Inf, so nothing was merged.")
        twin = layer.merge()
        sums = dict(twin.named_parameters(recurse=False))
        if any(name in own and own[name].shape != exact.shape for name, exact in sums.items()):
            continue
        for name, exact in sums.items():
            old = own.get(name)
            rounded = exact.detach().to(next(iter(own.values())).dtype if old is None else old.dtype)
            if not bool(rounded.isfinite().all()):
                raise ArtifactError(f"{path}.{name} with the adapter overflows {rounded.dtype}, so nothing was merged.")
            change += float((exact if old is None else exact - old).double().square().sum())
            lost += float((exact - rounded).double().square().sum())
            twin._parameters[name] = nn.Parameter(rounded, requires_grad=False)
        twins[path] = twin.eval()
    if not twins:
        raise NotMergeable(
            "The adapter has rows of new tokens alone, which stay beside the base's table. Use the adapter as it is."
        )
    for path, twin in twins.items():
        layers[path].set_twin(twin)
    return 1.0 - min(1.0, math.sqrt(lost / change)) if change else 1.0
