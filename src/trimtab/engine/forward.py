"""The packed forward pass: log-probabilities of a pack's rows."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trimtab.core.attention import Layout
from trimtab.core.attention_hook import install_hook, laid_out
from trimtab.core.errors import UnsupportedModel
from trimtab.core.wrapping import trunk_of, unwrap
from trimtab.data.pack import Pack
from trimtab.engine.counting_layers import patch_counting_layers
from trimtab.engine.frozen_cache import FrozenLayerCache
from trimtab.engine.head import Targets, head_of, sequence_logprobs
from trimtab.engine.layouts import PackLayout
from trimtab.engine.pass_mode import mode_of
from trimtab.engine.patching import layers_by_hand, learn_layers, patch_layers
from trimtab.engine.recompute import Level, recomputing
from trimtab.engine.state_layers import patch_state_layers
from trimtab.methods import Routing, routed, switch_of

DIVERGENCE_ROWS = 64
"""Tokens whose logits are held at a time, in two models."""


def hidden_states(model: Any, ids: Tensor, positions: Tensor, layout: Layout) -> Tensor:
    """The last hidden states of tokens, which attend as `layout` says: T d, or M d of its `output_at`, if it was `narrowed`."""
    if type(layout) is PackLayout:
        prepare(model)
    else:
        _patch(model)
    out = _trunk(model, ids, positions, layout)
    if not layout.reached:
        raise UnsupportedModel(
            f"{type(model).__name__} does not pass keyword arguments of forward on to attention, so examples cannot be packed."
        )
    hidden: Tensor = out.last_hidden_state[0]
    weight = getattr(unwrap(model.get_output_embeddings()), "weight", hidden)
    return hidden.to(weight.dtype)  # a residual stream may be float32 in a model of 16 bits (Mamba 2)


def prepare(model: Any) -> None:
    """Have packed passes computed by hand as far as the model's layers are known, which are learned once, by a small pass."""
    _patch(model)
    patch_layers(model)
    learn_layers(model, partial(_trunk, model))


def describe_layers(model: Any) -> dict[str, int]:
    """How the model's decoder layers are computed in packed passes, in words, and how many of them so."""
    prepare(model)
    return layers_by_hand(model)


def _patch(model: Any) -> None:
    install_hook(model)
    patch_state_layers(model)
    patch_counting_layers(model)


def _trunk(model: Any, ids: Tensor, positions: Tensor, layout: Layout) -> Any:
    layout.materialized = mode_of(model).materialized
    with laid_out(layout):
        return trunk_of(model)(input_ids=ids[None], position_ids=positions[None], layout=layout, use_cache=False)


def pack_logprobs(
    model: Any,
    pack: Pack,
    owners: Sequence[str | None] | None = None,
    *,
    recompute: Level = "none",
    frozen_cache: FrozenLayerCache | None = None,
) -> Tensor:
    """Σ weight · log p over the target tokens of each of the pack's rows: S. Differentiable.

    Args:
        owners: For each of the pack's segments, the name of the adapter that acts on it, or None for the base alone; unless
            given, the adapters that are on act on all of them.
        recompute: How much is computed again in the backward pass: slower, in less memory.
        frozen_cache: Has the frozen layers' outputs of earlier passes, and gets those of this one.
    """
    routing = None
    if owners is not None:
        switches = [switch_of(model, owner) for owner in owners]
        lengths = [end - start for start, end, _ in pack.segments]
        routing = Routing([switch for switch, length in zip(switches, lengths, strict=True) for _ in range(length)])
    cached = frozen_cache.serve(pack) if frozen_cache is not None else nullcontext()
    with routed(routing), recomputing(recompute), cached:
        hidden = states_at(model, pack, pack.predicts, routing)
    with routed(routing.select(pack.host.predicts.tolist()) if routing else None):
        return sequence_logprobs(hidden, head_of(model), Targets.of(pack))


@torch.no_grad()
def pack_divergences(model: Any, other: Any, as_other: Callable[[], AbstractContextManager[None]], pack: Pack) -> Tensor:
    """KL(p ‖ q) over the whole vocabulary at each of the pack's targets, p by `model` and q by `other`: N.

    Args:
        other: May be the same model, with other adapters on in the blocks of `as_other`.
    """
    hidden, head = states_at(model, pack, pack.predicts), head_of(model)
    with as_other():
        other_hidden, other_head = states_at(other, pack, pack.predicts), head_of(other)
    vocabulary, parts = min(len(head.weight), len(other_head.weight)), []  # either may be padded
    for p_part, q_part in zip(hidden.split(DIVERGENCE_ROWS), other_hidden.split(DIVERGENCE_ROWS), strict=True):
        p = head.logits(p_part)[:, :vocabulary].log_softmax(dim=1)
        with as_other():
            q = other_head.logits(q_part)[:, :vocabulary].log_softmax(dim=1)
        parts.append(torch.where(p == float("-inf"), 0.0, p.exp() * (p - q)).sum(dim=1))
    return torch.cat(parts)[pack.place]


def states_at(model: Any, pack: Pack, at: Tensor, routing: Routing | None = None) -> Tensor:
    """The last hidden states of the pack's tokens at M indices: M d."""
    layout = PackLayout(pack.segments, at if routing is None else None, int(pack.host.ids.max()))
    hidden = hidden_states(model, pack.ids, pack.positions, layout)
    return hidden if layout.narrowed else hidden.index_select(0, at)


@contextmanager
def one_thread() -> Iterator[None]:
    """Within the block, torch uses one thread: for work so small that threads would wait for each other longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
