"""A model's answer to a pack: the log-probability of each of its sequences; and the proof that packing changes nothing."""

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
    """The last hidden states of tokens laid out as `layout` says: T d, or those of the wanted ones, M d, if it has `narrowed`."""
    install_hook(model)
    if type(layout) is PackLayout:
        patch_layers(model)
    with laid_out():
        out = model.base_model(input_ids=ids[None], position_ids=positions[None], layout=layout, use_cache=False)
    if not layout.reached:
        raise UnsupportedModel(
            f"{type(model).__name__} does not hand keywords of forward on to attention, so rows cannot be packed."
        )
    return out.last_hidden_state[0]


def pack_logprobs(
    model: Any,
    pack: Pack,
    owners: Sequence[str | None] | None = None,
    *,
    recompute: bool = False,
    below: FrozenLayerCache | None = None,
) -> Tensor:
    """Σ log p over the learned tokens of each of the pack's sequences: S. Differentiable.

    Args:
        owners: For each of the pack's segments, the name of the adapter that acts on it, or None for the base alone; those
            that are switched on act on all of them unless given.
        recompute: Keep the layers' inputs alone, and compute the layers again in the backward pass: slower, in less memory.
        below: What is known of the rows from earlier passes, and learns from this one.
    """
    routing = None
    if owners is not None:
        switches = [switch_of(model, owner) for owner in owners]
        lengths = [end - start for start, end, _ in pack.segments]
        routing = Routing([one for one, length in zip(switches, lengths, strict=True) for _ in range(length)])
    at, row = pack.target_at.unique(return_inverse=True)
    with routed(routing), gradient_checkpointing(recompute), below.of(pack) if below is not None else nullcontext():
        hidden = states_at(model, pack, at, routing)
    with routed(routing.select(at.tolist()) if routing else None):
        return sequence_logprobs(hidden, row, head_of(model), pack.target_token, pack.target_sequence, len(pack.sequences))


@torch.no_grad()
def pack_divergences(model: Any, other: Any, as_other: Callable[[], AbstractContextManager[None]], pack: Pack) -> Tensor:
    """KL(p ‖ q) of whole distributions over the vocabulary, p in the model and q in the other, before each of the pack's targets: N.

    Args:
        other: May be the same model, with other adapters switched on in the blocks of `as_other`.
    """
    at, row = pack.target_at.unique(return_inverse=True)
    hidden, head = states_at(model, pack, at), head_of(model)
    with as_other():
        other_hidden, other_head = states_at(other, pack, at), head_of(other)
    vocabulary, parts = min(len(head.weight), len(other_head.weight)), []  # one's may be padded
    for p_part, q_part in zip(hidden.split(DIVERGENCE_ROWS), other_hidden.split(DIVERGENCE_ROWS), strict=True):
        p = head.logits(p_part)[:, :vocabulary].log_softmax(dim=1)
        with as_other():
            q = other_head.logits(q_part)[:, :vocabulary].log_softmax(dim=1)
        parts.append(torch.where(p == float("-inf"), 0.0, p.exp() * (p - q)).sum(dim=1))
    return torch.cat(parts)[row]


def states_at(model: Any, pack: Pack, at: Tensor, routing: Routing | None = None) -> Tensor:
    """The last hidden states of M of the pack's tokens: M d."""
    layout = PackLayout(pack.segments, at if routing is None else None)
    hidden = hidden_states(model, pack.ids, pack.positions, layout)
    return hidden if layout.narrowed else hidden[at]


@torch.no_grad()
def check_packing(model: Any) -> None:
    """Measure on two short rows that this model gives packed rows the log-probabilities it gives each alone.

    Whatever a model does between tokens that Trimtab does not know of (state, an unusual mask, a scaled logit) shows here.

    Raises:
        UnsupportedModel: It does not.
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
                f"{type(model).__name__} gives row {number} of two short rows the log-probability {ours:.6g} packed and "
                f"{reference:.6g} alone, so it cannot be trained on packed rows exactly."
            )


def _logprob_alone(model: Any, row: Tensor) -> float:
    with without_cudnn():
        logits = model(input_ids=row, use_cache=False).logits[0, :-1].cpu().double()
    return float(logits.log_softmax(-1).gather(1, row[0, 1:, None].cpu()).sum())


@contextmanager
def one_thread() -> Iterator[None]:
    """For work so small that threads would wait for each other longer than they work; by far, on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
