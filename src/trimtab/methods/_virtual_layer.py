"""How virtual tokens act: they are joined to every row inside attention, as keys and values.

P virtual tokens stand at positions 0 to P-1 and a row begins at position P, as if it had P tokens more. They are nowhere but
inside attention: so they act in any forward pass, packed or padded, with gradient checkpointing and on a quantized base, and
in decoding from Trimtab's cache and from Transformers' alike. A layer with a sliding window sees them as it sees any token,
while they are near enough.

Shapes: P virtual tokens, N numbers of the table for each, G key-value heads, K head size (V of values), d hidden size.
"""

from abc import abstractmethod
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.attention import AttentionCall, Layout, Rules, Virtual, attend, causal, refuse_reentrant
from trimtab.core.attention_hook import after_virtual, install_hook, laid_out
from trimtab.core.errors import RecipeError, UnsupportedModel
from trimtab.core.transfer import to_device
from trimtab.methods import AdapterLayer, Routing, unwrap
from trimtab.methods._switch import only_active

KeysValues = Mapping[int, tuple[Tensor, Tensor]]
"""Keys and values, G P K and G P V, by the number of the layer. Not every layer need attend."""

_ONE_ROW = "Two adapters with virtual tokens cannot act on one example: switch one of them off."
_NOT_FLATTENED = (
    "Several examples in one flattened row (packing or padding_free in TRL) have no place for an adapter's virtual tokens before each of "
    "them. Set packing=False and padding_free=False, or use a method without virtual tokens."
)


class VirtualLayer(AdapterLayer):
    """The model's trunk with virtual tokens before every row, which are made from a table, P × N."""

    def __init__(self, base: nn.Module, count: int, numbers: int) -> None:
        super().__init__(base)
        self.count, self.numbers = count, numbers

    @abstractmethod
    def table(self) -> Tensor:
        """The parameters themselves, or what a network makes of them: P × N."""

    def set_table(self, table: Tensor) -> None:
        """Make `table` return this."""
        self.table().copy_(table)

    @abstractmethod
    def keys_values(self) -> KeysValues:
        """What attention sees of the virtual tokens."""

    def adapt(self, input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        return self._run(None, input_ids, **kwargs)

    def route(self, routing: Routing, input_ids: Tensor | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        owned = [owner is self.switch for owner in routing.owners]
        return self._run(owned, input_ids, **kwargs) if any(owned) else self.base(input_ids, **kwargs)

    def _run(
        self,
        owned: list[bool] | None,
        input_ids: Tensor | None,
        *,
        position_ids: Tensor | None = None,
        layout: Layout | None = None,
        virtual: tuple[Virtual, ...] = (),
        **kwargs: Any,
    ) -> Any:
        if layout is not None:
            kwargs["layout"] = layout
            if layout.continues:
                return self.base(input_ids, position_ids=position_ids, **kwargs)
        if virtual and owned is None:
            raise RecipeError(_ONE_ROW)
        if kwargs.get("cu_seq_lens_q") is not None:
            raise UnsupportedModel(_NOT_FLATTENED)
        if position_ids is None:
            position_ids = _default_positions(input_ids if input_ids is not None else kwargs["inputs_embeds"], kwargs)
        shift = self.count if owned is None else to_device([self.count * owns for owns in owned], position_ids.device)
        with only_active(self.switch) if owned is not None else nullcontext():
            own = Virtual(self.keys_values(), acts_on=owned.__getitem__ if owned is not None else None)
        with after_virtual(self.count) if layout is None else nullcontext():
            out = self.base(input_ids, position_ids=position_ids + shift, virtual=(*virtual, own), **kwargs)
        own.check_reached(type(self.base).__name__)
        return out

    def compute_keys_values(self, ids: Tensor | None = None, embeddings: Tensor | None = None) -> KeysValues:
        """The base's keys and values of tokens (P) or embeddings (P d) at positions 0 to P-1, differentiably."""
        keys_values = record_keys_values(self.base, ids, embeddings)
        if embeddings is not None and embeddings.requires_grad and torch.is_grad_enabled():
            key, _ = next(iter(keys_values.values()))
            if not key.requires_grad:
                refuse_reentrant()
        return keys_values

    def __getattr__(self, name: str) -> Any:
        """What the model asks its trunk for besides calling it (`embed_tokens`, `get_input_embeddings`, …), the base answers."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)


def _default_positions(tokens: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """Positions where the caller passes none: padding is not counted, and what a cache holds stands before these tokens."""
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return (mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
    cache = kwargs.get("cache", kwargs.get("past_key_values"))
    past = cache.get_seq_length() if cache is not None else 0
    return torch.arange(past, past + tokens.shape[1], device=tokens.device)[None]


def record_keys_values(trunk: nn.Module, ids: Tensor | None = None, embeddings: Tensor | None = None) -> KeysValues:
    """Keys and values of one run of tokens (T) or embeddings (T d) at positions 0 to T-1.

    Raises:
        UnsupportedModel: The trunk does not say how it attends, or a layer attends more than once.
    """
    install_hook(trunk)
    recorder, name = _KeysValuesRecorder(), type(unwrap(trunk)).__name__
    if embeddings is not None:
        base: Any = unwrap(trunk)
        tokens, count = {"inputs_embeds": embeddings[None].to(base.dtype)}, len(embeddings)
    else:
        assert ids is not None
        tokens, count = {"input_ids": ids[None]}, len(ids)
    device = next(trunk.parameters()).device
    tokens["position_ids"] = torch.arange(count, device=device)[None]
    with laid_out(recorder):
        try:
            trunk(**tokens, layout=recorder, use_cache=False)
        except (AttributeError, TypeError) as error:  # it computes with a mask
            raise UnsupportedModel(
                f"{name} cannot run without masks ({error}), so what a virtual token's keys are is not known. Use a method that changes "
                "weights, such as lora."
            ) from error
    if not recorder.by_layer:
        raise UnsupportedModel(f"{name} does not hand keywords of forward on to attention, so virtual tokens cannot reach it.")
    if len(recorder.calls) != len(recorder.by_layer):
        raise UnsupportedModel(
            f"{name} has layers that attend more than once in a pass, so which keys a virtual token has is not defined. "
            "Use a method that changes weights, such as lora."
        )
    return {number: (key[0], value[0]) for number, (key, value) in sorted(recorder.by_layer.items())}


class _KeysValuesRecorder:
    """The layout of one run of tokens whose keys and values are recorded."""

    continues = False
    materialized = False
    reached = False

    def __init__(self) -> None:
        self.by_layer: dict[int, tuple[Tensor, Tensor]] = {}
        self.calls: list[int] = []

    def attend(self, call: AttentionCall) -> Tensor:
        layer, query, key, value, rules, virtual, _ = call
        if virtual:
            raise RecipeError(_ONE_ROW)
        number = int(layer.layer_idx)  # type: ignore[arg-type]
        self.calls.append(number)
        self.by_layer[number] = (key, value)
        return attend(query, key, value, causal(query.shape[2], key.shape[2], rules, query.device), rules).transpose(1, 2)

    def mask(self, rules: Rules, device: torch.device) -> Tensor:
        raise AssertionError("not materialized")
