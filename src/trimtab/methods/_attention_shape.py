"""What attention sees of a token in each layer, and the module before which virtual tokens stand: both asked of the model itself."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from trimtab.core.errors import UnsupportedModel
from trimtab.core.wrapping import trunk_of, unwrap
from trimtab.methods._attach import adapters
from trimtab.methods._switch import switched
from trimtab.methods._virtual_layer import record_keys_values


class LayerShape(NamedTuple):
    """The size of what a layer's attention sees of a token."""

    heads: int
    """Key-value heads, G."""
    key: int
    """K."""
    value: int
    """V."""


class AttentionShape(NamedTuple):
    """The same for all layers that attend, by their numbers."""

    layers: dict[int, LayerShape]

    @property
    def widths(self) -> list[int]:
        """Of keys and values in turn: G · K, G · V."""
        return [layer.heads * size for layer in self.layers.values() for size in (layer.key, layer.value)]

    @property
    def numbers(self) -> int:
        """In all keys and values of one token."""
        return sum(self.widths)

    def is_uniform(self, count: int) -> bool:
        """Whether `count` layers attend, all alike: PEFT's prefixes have no other form."""
        first = next(iter(self.layers.values()))
        alike = all(layer == first for layer in self.layers.values()) and first.key == first.value
        return alike and [*self.layers] == [*range(count)]


_shapes: WeakKeyDictionary[nn.Module, AttentionShape] = WeakKeyDictionary()
_trunks: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()


def attention_shape(trunk: Any) -> AttentionShape:
    """What attention sees of one token, asked of the model itself: configurations say it in too many ways. Raises UnsupportedModel."""
    trunk = unwrap(trunk)
    if trunk not in _shapes:
        token = torch.zeros(1, dtype=torch.long, device=next(trunk.parameters()).device)
        with torch.no_grad(), _computable(trunk):
            seen = record_keys_values(trunk, token)
        shapes = {number: LayerShape(len(k), k.shape[-1], v.shape[-1]) for number, (k, v) in seen.items()}
        _shapes[trunk] = AttentionShape(shapes)
    return _shapes[trunk]


@contextmanager
def _computable(trunk: Any) -> Iterator[None]:
    """Within the block, a model without weights computes shapes: its experts by the one way that does without numbers."""
    if not next(trunk.parameters()).is_meta:
        yield
        return
    configs = {
        id(m.config): m.config for m in trunk.modules() if hasattr(getattr(m, "config", None), "_experts_implementation")
    }
    own = [(config, config._experts_implementation) for config in configs.values()]
    try:
        for config, _ in own:
            config._experts_implementation = "batched_mm"
        yield
    finally:
        for config, name in own:
            config._experts_implementation = name


def called_trunk(model: Any) -> nn.Module:
    """The module that the model's own forward pass calls to get hidden states: its trunk, or a decoder in it (OPT).

    Raises:
        UnsupportedModel: It calls neither, so whatever stood there would be ignored.
    """
    if next(model.parameters()).is_meta:  # without weights, nothing is put there
        return unwrap(trunk_of(model))
    if model not in _trunks:
        called: list[nn.Module] = []
        candidates = [m for m in (unwrap(trunk_of(model)), unwrap(model.get_decoder())) if m is not model]
        hooks = [module.register_forward_pre_hook(lambda module, _: called.append(module)) for module in candidates]
        try:
            with torch.no_grad(), switched({adapter.switch: False for adapter in adapters(model).values()}):
                model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        if not called:
            raise UnsupportedModel(
                f"The forward pass of {type(model).__name__} does not call its {type(candidates[0]).__name__}, where virtual tokens "
                "would stand. Use a method that changes weights, such as lora."
            )
        _trunks[model] = called[0]
    return _trunks[model]
