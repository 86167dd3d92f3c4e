"""The language model head: from hidden states to log-probabilities of rows, without holding all logits.

Shapes: M tokens that predict, N targets (a token has several where rows diverge), d hidden size, V vocabulary, S rows.
"""

from contextvars import copy_context
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trimtab.core.attention import at_least_float32
from trimtab.core.errors import UnsupportedModel
from trimtab.engine.backends import backend_for
from trimtab.engine.pass_mode import mode_of
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
    """The adapter layer around the matrix, which computes hidden Wᵀ + bias instead."""

    def logits(self, hidden: Tensor, part: slice = slice(None), out: Tensor | None = None) -> Tensor:
        """M d -> M V, in at least float32; or of a part of the vocabulary, without an adapter, perhaps over `out`."""
        adapted = self.adapted is not None and part == slice(None)
        raw = self.adapted(hidden[None])[0] if adapted else torch.mm(hidden, self.weight[part].T, out=out)  # type: ignore[misc]
        raw = at_least_float32(raw)
        if self.bias is not None and not adapted:
            raw = raw + self.bias[part]
        if self.scale != 1.0:
            raw = raw * self.scale
        if self.softcap is None:
            return raw
        capped = self.softcap * torch.tanh(raw / self.softcap)
        # Tokens that only other adapters have (−∞) stay impossible.
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
            "The language model head is trained, and Trimtab's head supports a frozen one: use the method full."
        )
    if (scale := mode_of(model).head_scale) is None:
        scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
        scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(module.weight, module.bias, scale, softcap, adapted=outer if _is_active(outer) else None)


def _is_active(module: nn.Module) -> bool:
    """Whether an adapter on this module is on."""
    return isinstance(module, AdapterLayer) and (bool(module.switch.state) or _is_active(module.base))


def sequence_logprobs(hidden: Tensor, at: Tensor, head: Head, token: Tensor, row: Tensor, count: int) -> Tensor:
    """Σ log p(token | hidden) over each row's targets: S, at least float32.

    One pass over the vocabulary, a tile of logits at a time, computes a running softmax (Milakov & Gimelshein 2018,
    arXiv:1805.02867) and the mean row of the head's matrix that the gradient needs. The backward pass then has the gradient of
    each sum up to a factor, which is exact for every loss that is a function of these sums, and costs two matrix products
    where recomputing the logits costs three. An adapted head is trained too, so its backward pass recomputes each tile.

    Args:
        hidden: M d, the hidden states that predict.
        at: N, the index of the one that predicts each target.
        token: N, the targets.
        row: N, the row of each target, in 0..count-1.
    """
    if head.adapted is None:
        return _SequenceLogProbs.apply(hidden, at, head, token, row, count)
    routing, context = current_routing(), copy_context()
    rows, dtype = max(ROWS, TILE // len(head.weight)), hidden.dtype
    hidden = at_least_float32(hidden)  # in which the gradients of a token's targets are summed
    parts = [hidden.new_zeros(0)]
    for start in range(0, len(at), rows):
        tile = slice(start, start + rows)
        part = routing.select(at[tile].tolist()) if routing is not None else None
        arguments = hidden[at[tile]].to(dtype), head, token[tile], part
        parts.append(checkpoint(context.copy().run, _logprobs, *arguments, use_reentrant=False))
    logprob = torch.cat(parts)
    return torch.zeros(count, dtype=logprob.dtype, device=hidden.device).index_add(0, row, logprob)


def _logprobs(hidden: Tensor, head: Head, token: Tensor, routing: Routing | None) -> Tensor:
    """log p(token | hidden): N. Runs both times in the context of the forward pass, which says which adapters are on."""
    with routed(routing):
        logits = head.logits(hidden)
    return logits.log_softmax(dim=1).gather(1, token[:, None])[:, 0]


class _SequenceLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, at: Tensor, head: Head, token: Tensor, row: Tensor, count: int) -> Tensor:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        top = torch.full((len(hidden),), torch.finfo(dtype).min, dtype=dtype, device=hidden.device)
        total, chosen = torch.zeros_like(top), torch.zeros(len(at), dtype=dtype, device=hidden.device)
        backward = ctx.needs_input_grad[0]
        mean = torch.zeros_like(hidden, dtype=dtype) if backward else None  # else bfloat16 would round it once a tile
        size = max(1, TILE // max(1, len(hidden)))
        starts = range(0, len(head.weight), size)
        tile = hidden.new_empty(len(hidden) * min(size, len(head.weight)))
        by_token = token.argsort()
        cuts = torch.searchsorted(token[by_token], torch.tensor([*starts, len(head.weight)], device=token.device)).tolist()
        if cuts[-1] < len(token):
            raise IndexError(f"token {int(token.max())} is beyond the head's {len(head.weight)}")
        for start, low, high in zip(starts, cuts, cuts[1:], strict=False):
            part, targets = slice(start, start + size), by_token[low:high]
            width = min(size, len(head.weight) - start)
            logits = head.logits(hidden, part, tile[: len(hidden) * width].view(-1, width))
            chosen[targets] = logits[at[targets], token[targets] - start]
            cap_slope = 1 - (logits / head.softcap) ** 2 if head.softcap is not None and backward else None
            rescale = backend_for(logits, top, total).softmax_tile_(logits, top, total)  # the logits are exp(logits − top) now
            if mean is not None:
                weights = logits if cap_slope is None else logits * cap_slope
                _add_product_(mean.mul_(rescale[:, None]), weights.to(hidden.dtype), head.weight[part])
        logprob = (chosen - top[at]) - total.log()[at]  # in this order, so that no digit of a log p near 0 is lost to `top`
        if mean is not None:
            mean.div_(total[:, None])
            slope = None if head.softcap is None else 1 - (chosen / head.softcap) ** 2
            ctx.head, ctx.dtype = head, hidden.dtype
            ctx.save_for_backward(mean, at, token, row, slope)
        return torch.zeros(count, dtype=dtype, device=hidden.device).index_add_(0, row, logprob)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """d log p(token) / d hidden = scale · (cap slope of token · its row of the head − Σ p · cap slope · rows of the head)."""
        mean, at, token, row, slope = ctx.saved_tensors
        dtarget = gradients[0][row] * ctx.head.scale
        dx = mean * -torch.zeros_like(mean[:, 0]).index_add_(0, at, dtarget)[:, None]
        dlogit = dtarget if slope is None else dtarget * slope
        dx.index_add_(0, at, ctx.head.weight[token] * dlogit[:, None])
        return dx.to(ctx.dtype), None, None, None, None, None


def _add_product_(to: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """to + a @ b, in place, where a and b may have fewer bits."""
    return to.addmm_(a, b) if to.dtype == a.dtype else to.add_(a @ b)
