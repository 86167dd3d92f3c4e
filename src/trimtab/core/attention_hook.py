"""The hook into the attention of Transformers' models.

After `install_hook`, every call of the model's attention comes here. A forward pass with the keyword argument `layout` attends as
that layout says; one with `virtual` has virtual tokens before its rows; any other calls the model's own attention, and gives
bit-identical results.

Shapes: query B H T K, key B G T K, value B G T V, as in core/attention.py; output B T H V.
"""

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import cache, partial, wraps
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.core.attention import AttentionCall, Layout, LocalMask, Rules, Virtual, attend, causal
from trimtab.core.errors import UnsupportedModel

PREFIX = "trimtab-"
"""Our attention is registered as this and the name of the model's own, which it calls."""

_layout: ContextVar[Layout | None] = ContextVar("layout", default=None)
_virtual_count: ContextVar[int] = ContextVar("virtual_count", default=0)
"""Virtual tokens before the rows of the model's own forward pass that is running."""
_asked_sizes: ContextVar[set[int]] = ContextVar("asked_sizes", default=set())  # noqa: B039 (written, never read)


class HookedName(str):
    """The name of our attention. It equals the model's own too: some models compare it, and compute otherwise for others."""

    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and str(other) in (str(self), self.removeprefix(PREFIX))

    def __ne__(self, other: object) -> bool:
        return not self == other


_HARMLESS = {"position_ids", "cache_position", "position_embeddings", "num_items_in_batch"}
"""Tensors that models pass to attention functions, which do not need them; the last is Trainer's, for the loss."""


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    own: str,
    layout: Layout | None = None,
    virtual: Sequence[Virtual] = (),
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    if layout is None and not virtual:
        return _own_attention(own, module)(module, query, key, value, attention_mask, **options)
    rules = _rules(module, mask=attention_mask, **options)
    if layout is not None:
        mask = attention_mask if isinstance(attention_mask, Tensor) else None
        return layout.attend(AttentionCall(module, query, key, value, rules, virtual, mask)), None
    return _attend_after_virtual(module, query, key, value, attention_mask, rules, virtual, own), None


def _rules(
    module: nn.Module,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    mask: Tensor | LocalMask | None = None,
    **options: Any,
) -> Rules:
    unknown = [name for name, value in options.items() if isinstance(value, Tensor) and name not in _HARMLESS]
    if unknown or dropout or not getattr(module, "is_causal", True):
        reason = f"the tensor {unknown[0]}" if unknown else "attention dropout" if dropout else "attention to later tokens"
        raise UnsupportedModel(
            f"{type(module).__name__} asks attention for {reason}, which Trimtab's packed attention does not support."
        )
    local = mask if isinstance(mask, LocalMask) else LocalMask(sliding_window)
    return Rules(scaling, local.window, softcap, local.chunk, s_aux)


def _own_attention(own: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if own == "eager":  # not registered: each model's file has its own
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[own]


def _attend_after_virtual(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    rules: Rules,
    virtual: Sequence[Virtual],
    own: str,
) -> Tensor:
    """Attention of rows as Transformers batches them, padded and with its cache, after virtual tokens."""
    if own not in ("sdpa", "eager"):
        raise UnsupportedModel(
            f"Virtual tokens do not work with {own} outside Trimtab's own forward pass. "
            'Load the model with attn_implementation="sdpa".'
        )
    for tokens in virtual:
        k, v = (t.expand(len(key), -1, -1, -1) for t in tokens.of(module, key))
        key, value = torch.cat([k, key], dim=2), torch.cat([v, value], dim=2)
        mask = None if mask is None else F.pad(mask, (k.shape[2], 0), value=True if mask.dtype == torch.bool else 0.0)
    if rules.window is not None and key.shape[2] > rules.window:
        _refuse_long(key.shape[2], rules.window)
    if mask is None:
        mask = causal(query.shape[2], key.shape[2], Rules(None), query.device)
    return attend(query, key, value, mask, rules).transpose(1, 2)


def _refuse_long(tokens: int, size: int) -> NoReturn:
    raise UnsupportedModel(
        f"Rows of {tokens:,} tokens, virtual ones included, exceed the sliding window or chunk of this model's attention "
        f"({size:,}), which only Trimtab's own forward pass counts correctly: use trimtab.generate and trimtab.fit."
    )


def _mask(*args: Any, own: str, **kwargs: Any) -> Any:
    """The mask of the model's own attention. Where a layout says to which keys tokens attend: a LocalMask, or None."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    size = kwargs.get("local_size")
    if size is not None:
        _asked_sizes.get().add(size)
    if (layout := _layout.get()) is not None:
        chunked = size is not None and "chunked_overlay" in _parts(kwargs["mask_function"])
        local = LocalMask(chunk=size) if chunked else LocalMask(window=size)
        if layout.materialized:
            return _as_model_expects(
                layout.mask(Rules(None, window=local.window, chunk=local.chunk), kwargs["device"]), own, kwargs["dtype"]
            )
        return local if size is not None else None
    if own not in ALL_MASK_ATTENTION_FUNCTIONS:
        return None
    if size is not None and (count := _virtual_count.get()) and kwargs["kv_length"] + count > size:
        _refuse_long(kwargs["kv_length"] + count, size)
    return ALL_MASK_ATTENTION_FUNCTIONS[own](*args, **kwargs)


def _as_model_expects(mask: Tensor, own: str, dtype: torch.dtype) -> Tensor:
    """Eager attention adds its mask to the scores."""
    return mask if own != "eager" else torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def _parts(function: Any) -> set[str]:
    """The names of the functions in Transformers that made a mask's function and those it combines."""
    names = {getattr(function, "__qualname__", "").partition(".")[0]}
    for cell in getattr(function, "__closure__", None) or ():
        values = cell.cell_contents if isinstance(cell.cell_contents, tuple) else (cell.cell_contents,)
        names.update(*(_parts(value) for value in values if callable(value)))
    return names


@contextmanager
def holding(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    """The context variable has this value within the block, in this thread."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def after_virtual(count: int) -> AbstractContextManager[None]:
    """The model's own forward pass within the block has so many virtual tokens before its rows."""
    return holding(_virtual_count, count)


def laid_out(layout: Layout) -> AbstractContextManager[None]:
    """The forward pass within the block has this layout, which takes the place of masks."""
    return holding(_layout, layout)


@contextmanager
def recording_sizes() -> Iterator[set[int]]:
    """The windows and chunks for which this model's masks are asked within the block."""
    sizes: set[int] = set()
    with holding(_asked_sizes, sizes):
        yield sizes


def current_layout() -> Layout | None:
    """The layout of the forward pass that is running, if it has one."""
    return _layout.get()


def install_hook(model: nn.Module) -> None:
    """Route every call of this model's attention through here. Nothing changes for calls without a layout or virtual tokens."""
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    _skip_search()
    names = [(config, config._attn_implementation) for config in _configs(model)]
    if all(own is None or own.startswith(PREFIX) for _, own in names):
        return
    for config, own in names:  # from the outside: a configuration hands what is set on to those in it
        if own is not None and not own.startswith(PREFIX):
            AttentionInterface.register(PREFIX + own, partial(_attention, own=own))
            AttentionMaskInterface.register(PREFIX + own, partial(_mask, own=own))
            own = HookedName(PREFIX + own)
        config._attn_implementation = own


def _skip_search() -> None:
    """Let Transformers not look for rows in the positions of a pass with a layout: it waits for the device, and `_mask` needs none."""
    from transformers import masking_utils

    own = getattr(masking_utils, "find_packed_sequence_indices", None)
    if own is None or hasattr(own, "__wrapped__"):
        return

    @wraps(own)
    def find_packed_sequence_indices(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs) if current_layout() is None else None

    masking_utils.find_packed_sequence_indices = find_packed_sequence_indices


def remove_hook(model: nn.Module) -> None:
    """Undo `install_hook`, and remove patched forward passes."""
    for module in model.modules():
        if getattr(module.__dict__.get("forward"), "is_patch", False):
            del module.forward
    for config, own in [(config, config._attn_implementation) for config in _configs(model)]:
        config._attn_implementation = own if own is None else own.removeprefix(PREFIX)


def _configs(model: nn.Module) -> list[Any]:
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config") and uses_interface(type(m))}
    return [config for config in configs.values() if hasattr(config, "_attn_implementation")]


def uses_interface(kind: type) -> bool:
    """Whether the code of a class asks Transformers' attention interface for its attention; other code may replace an unknown name."""
    return _asks_interface(kind.__module__)


@cache
def _asks_interface(module: str) -> bool:
    try:
        return "get_interface(" in inspect.getsource(sys.modules[module])
    except (OSError, TypeError, KeyError):  # a class of a notebook or of an interpreter has no file
        return False
