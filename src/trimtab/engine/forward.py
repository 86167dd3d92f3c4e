"""The packed forward pass: log-probabilities of a pack's rows, and the check that packing does not change them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from trimtab.core.attention_hook import Layout, install_hook, laid_out, without_cudnn
from trimtab.core.errors import UnsupportedModel
from trimtab.data.example import TokenRow
from trimtab.data.pack import Pack, pack_flat
from trimtab.engine.frozen_cache import FrozenLayerCache
from trimtab.engine.head import head_of, sequence_logprobs
from trimtab.engine.layouts import PackLayout
from trimtab.engine.patching import gradient_checkpointing, patch_layers
from trimtab.methods import Routing, routed, switch_of, unwrap

DIVERGENCE_ROWS = 64
"""Tokens whose logits are held at a time, in two models."""


def hidden_states(model: Any, ids: Tensor, positions: Tensor, layout: Layout) -> Tensor:
    """The last hidden states of tokens, which attend as `layout` says: T d, or M d of its `output_at`, if it was `narrowed`."""
    install_hook(model)
    if type(layout) is PackLayout:
        patch_layers(model)
    with laid_out():
        out = model.base_model(input_ids=ids[None], position_ids=positions[None], layout=layout, use_cache=False)
    if not layout.reached:
        raise UnsupportedModel(
            f"{type(model).__name__} does not pass keyword arguments of forward on to attention, so examples cannot be packed."
        )
    return out.last_hidden_state[0]


def pack_logprobs(
    model: Any,
    pack: Pack,
    owners: Sequence[str | None] | None = None,
    *,
    recompute: bool = False,
    frozen_cache: FrozenLayerCache | None = None,
) -> Tensor:
    """Σ log p over the target tokens of each of the pack's rows: S. Differentiable.

    Args:
        owners: For each of the pack's segments, the name of the adapter that acts on it, or None for the base alone; unless
            given, the adapters that are on act on all of them.
        recompute: With gradient checkpointing: slower, in less memory.
        frozen_cache: Has the frozen layers' outputs of earlier passes, and gets those of this one.
    """
    routing = None
    if owners is not None:
        switches = [switch_of(model, owner) for owner in owners]
        lengths = [end - start for start, end, _ in pack.segments]
        routing = Routing([switch for switch, length in zip(switches, lengths, strict=True) for _ in range(length)])
    at, row = pack.target_at.unique(return_inverse=True)
    cached = frozen_cache.serve(pack) if frozen_cache is not None else nullcontext()
    with routed(routing), gradient_checkpointing(recompute), cached:
        hidden = states_at(model, pack, at, routing)
    with routed(routing.select(at.tolist()) if routing else None):
        return sequence_logprobs(hidden, row, head_of(model), pack.target_token, pack.target_row, len(pack.rows))


@torch.no_grad()
def pack_divergences(model: Any, other: Any, as_other: Callable[[], AbstractContextManager[None]], pack: Pack) -> Tensor:
    """KL(p ‖ q) over the whole vocabulary at each of the pack's targets, p by `model` and q by `other`: N.

    Args:
        other: May be the same model, with other adapters on in the blocks of `as_other`.
    """
    at, row = pack.target_at.unique(return_inverse=True)
    hidden, head = states_at(model, pack, at), head_of(model)
    with as_other():
        other_hidden, other_head = states_at(other, pack, at), head_of(other)
    vocabulary, parts = min(len(head.weight), len(other_head.weight)), []  # either may be padded
    for p_part, q_part in zip(hidden.split(DIVERGENCE_ROWS), other_hidden.split(DIVERGENCE_ROWS), strict=True):
        p = head.logits(p_part)[:, :vocabulary].log_softmax(dim=1)
        with as_other():
            q = other_head.logits(q_part)[:, :vocabulary].log_softmax(dim=1)
        parts.append(torch.where(p == float("-inf"), 0.0, p.exp() * (p - q)).sum(dim=1))
    return torch.cat(parts)[row]


def states_at(model: Any, pack: Pack, at: Tensor, routing: Routing | None = None) -> Tensor:
    """The last hidden states of the pack's tokens at M indices: M d."""
    layout = PackLayout(pack.segments, at if routing is None else None)
    hidden = hidden_states(model, pack.ids, pack.positions, layout)
    return hidden if layout.narrowed else hidden[at]


@torch.no_grad()
def check_packing(model: Any) -> None:
    """Check on two short rows that this model gives packed rows the log-probabilities that it gives each row alone.

    Whatever a model does between tokens that Trimtab does not know of (state, an unusual mask, scaled logits) shows here.

    Raises:
        UnsupportedModel: The log-probabilities differ.
    """
    device, vocabulary = next(model.parameters()).device, model.config.get_text_config().vocab_size
    exact = unwrap(model.get_input_embeddings()).weight.dtype in (torch.float32, torch.float64)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in (7, 5)]
    pack = pack_flat(TokenRow(ids, list(range(1, len(ids))), "check") for ids in rows).to(device)
    with one_thread():
        packed = pack_logprobs(model, pack).tolist()
        alone = [_logprob_alone(model, torch.tensor([ids], device=device)) for ids in rows]
    for number, (ours, reference) in enumerate(zip(packed, alone, strict=True), start=1):
        if not abs(ours - reference) <= abs(reference) * (1e-4 if exact else 3e-2):
            raise UnsupportedModel(
                f"{type(model).__name__} gives example {number} of two short ones the log-probability {ours:.6g} packed and "
                f"{reference:.6g} alone, so it cannot be trained on packed examples exactly."
            )


def _logprob_alone(model: Any, row: Tensor) -> float:
    with without_cudnn():
        logits = model(input_ids=row, use_cache=False).logits[0, :-1].cpu().double()
    return float(logits.log_softmax(-1).gather(1, row[0, 1:, None].cpu()).sum())


@contextmanager
def one_thread() -> Iterator[None]:
    """Within the block, torch uses one thread: for work so small that threads would wait for each other longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
