"""From hidden states to log-probabilities of sequences, without ever holding the logits.

Shapes: M tokens that predict, N targets (a token has several where answers part), d hidden size, V vocabulary, S sequences.
"""

from contextvars import copy_context
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trimtab.core.errors import UnsupportedModel
from trimtab.engine.backends import backend_for
from trimtab.methods import AdapterLayer, Routing, current_routing, routed, unwrap

TILE = 500_000
"""Logits formed at a time: 2 MB of float32, which stay in a cache."""
ROWS = 64
"""Rows of logits formed at a time, at least, by an adapted head: it computes with whole rows."""


class Head(NamedTuple):
    """A language model head: logits = cap(scale · (hidden Wᵀ + bias)), with cap(z) = softcap · tanh(z / softcap)."""

    weight: Tensor
    """V d."""
    bias: Tensor | None
    """V."""
    scale: float = 1.0
    softcap: float | None = None
    adapted: nn.Module | None = None
    """An adapter's layer around the matrix, which computes hidden Wᵀ + bias in its place."""

    def logits(self, hidden: Tensor, part: slice = slice(None), out: Tensor | None = None) -> Tensor:
        """M d -> M V, in at least float32; or those of a part of the vocabulary, without an adapter, perhaps over `out`."""
        whole = self.adapted is not None and part == slice(None)
        raw = self.adapted(hidden[None])[0] if whole else torch.mm(hidden, self.weight[part].T, out=out)  # type: ignore[misc]
        raw = raw.to(torch.promote_types(raw.dtype, torch.float32))
        if self.bias is not None and not whole:
            raw = raw + self.bias[part]
        if self.scale != 1.0:
            raw = raw * self.scale
        if self.softcap is None:
            return raw
        capped = self.softcap * torch.tanh(raw / self.softcap)
        # Of tokens that only other adapters know (−∞), no cap makes likelier ones.
        return capped if self.adapted is None else capped.masked_fill(raw == float("-inf"), float("-inf"))


def head_of(model: Any) -> Head:
    """The head of a Transformers causal language model.

    Raises:
        UnsupportedModel: The base's own head is trained, or is not one matrix.
    """
    outer, config = model.get_output_embeddings(), model.config.get_text_config()
    module = unwrap(outer)
    if not isinstance(module, nn.Linear):
        raise UnsupportedModel(f"The head of {type(model).__name__} is a {type(module).__name__}, not a matrix.")
    if module.weight.requires_grad:
        raise UnsupportedModel(
            "The language model head is trained, and Trimtab's head takes it as frozen: use the method full."
        )
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(module.weight, module.bias, scale, softcap, adapted=outer if _acts(outer) else None)


def _acts(module: nn.Module) -> bool:
    """Whether an adapter on this module changes what it computes here and now."""
    return isinstance(module, AdapterLayer) and (bool(module.switch.state) or _acts(module.base))


def sequence_logprobs(hidden: Tensor, row: Tensor, head: Head, token: Tensor, sequence: Tensor, count: int) -> Tensor:
    """Σ log p(token | hidden) over each sequence's targets: S, at least float32.

    The vocabulary is swept once, a tile of logits at a time, with a running softmax (Milakov & Gimelshein 2018,
    arXiv:1805.02867); the mean head row that the gradient needs is summed in the same sweep. The backward pass then knows
    the gradient of each sequence's sum up to one number a sequence. That is exact for every loss that is a function of
    these sums, and costs two matrix products where forming the logits again costs three.

    Args:
        hidden: M d, the hidden states that predict.
        row: N, which of them predicts each target.
        token: N, the targets.
        sequence: N, which sequence each target belongs to, in 0..count-1.

    An adapted head learns too, so its gradients need each tile's logits once more, in the backward pass.
    """
    if head.adapted is None:
        return _SequenceLogProbs.apply(hidden, row, head, token, sequence, count)
    routing, here = current_routing(), copy_context()
    rows, kind = max(ROWS, TILE // len(head.weight)), hidden.dtype
    hidden = hidden.to(torch.promote_types(kind, torch.float32))  # in which the gradients of a token's targets are added up
    parts = [hidden.new_zeros(0)]
    for start in range(0, len(row), rows):
        tile = slice(start, start + rows)
        part = routing.select(row[tile].tolist()) if routing is not None else None
        given = hidden[row[tile]].to(kind), head, token[tile], part
        parts.append(checkpoint(here.copy().run, _logprobs, *given, use_reentrant=False))
    logprob = torch.cat(parts)
    return torch.zeros(count, dtype=logprob.dtype, device=hidden.device).index_add(0, sequence, logprob)


def _logprobs(hidden: Tensor, head: Head, token: Tensor, routing: Routing | None) -> Tensor:
    """log p(token | hidden): N. Run in the context of the forward pass, which says what acts, both times it is computed."""
    with routed(routing):
        logits = head.logits(hidden)
    return logits.log_softmax(dim=1).gather(1, token[:, None])[:, 0]


class _SequenceLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, row: Tensor, head: Head, token: Tensor, sequence: Tensor, count: int) -> Tensor:
        kind = torch.promote_types(hidden.dtype, torch.float32)
        top = torch.full((len(hidden),), torch.finfo(kind).min, dtype=kind, device=hidden.device)
        total, chosen = torch.zeros_like(top), torch.zeros(len(row), dtype=kind, device=hidden.device)
        wanted = ctx.needs_input_grad[0]
        mean = torch.zeros_like(hidden, dtype=kind) if wanted else None  # else bfloat16 would round it once a tile
        size = max(1, TILE // max(1, len(hidden)))
        starts = range(0, len(head.weight), size)
        tile = hidden.new_empty(len(hidden) * min(size, len(head.weight)))
        by_token = token.argsort()
        cuts = torch.searchsorted(token[by_token], torch.tensor([*starts, len(head.weight)], device=token.device)).tolist()
        if cuts[-1] < len(token):
            raise IndexError(f"token {int(token.max())} is beyond the head's {len(head.weight)}")
        for start, low, high in zip(starts, cuts, cuts[1:], strict=False):
            part, here = slice(start, start + size), by_token[low:high]
            width = min(size, len(head.weight) - start)
            logits = head.logits(hidden, part, tile[: len(hidden) * width].view(-1, width))
            chosen[here] = logits[row[here], token[here] - start]
            bend = 1 - (logits / head.softcap) ** 2 if head.softcap is not None and wanted else None
            rescale = backend_for(logits, top, total).softmax_tile_(logits, top, total)  # the logits are exp(logits − top) now
            if mean is not None:
                weights = logits if bend is None else logits * bend
                _add_product_(mean.mul_(rescale[:, None]), weights.to(hidden.dtype), head.weight[part])
        logprob = (chosen - top[row]) - total.log()[row]  # in this order, so that no digit of a log p near 0 is lost to `top`
        if mean is not None:
            mean.div_(total[:, None])
            slope = None if head.softcap is None else 1 - (chosen / head.softcap) ** 2
            ctx.head, ctx.kind = head, hidden.dtype
            ctx.save_for_backward(mean, row, token, sequence, slope)
        return torch.zeros(count, dtype=kind, device=hidden.device).index_add_(0, sequence, logprob)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """d log p(token) / d hidden = scale · (bend of token · its row of the head − Σ p · bend · rows of the head)."""
        mean, row, token, sequence, slope = ctx.saved_tensors
        each = gradients[0][sequence] * ctx.head.scale
        dx = mean * -torch.zeros_like(mean[:, 0]).index_add_(0, row, each)[:, None]
        pull = each if slope is None else each * slope
        dx.index_add_(0, row, ctx.head.weight[token] * pull[:, None])
        return dx.to(ctx.kind), None, None, None, None, None


def _add_product_(to: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """to + one @ other, in place, where those two may be of fewer bits."""
    return to.addmm_(one, other) if to.dtype == one.dtype else to.add_(one @ other)
