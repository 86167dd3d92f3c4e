"""From hidden states to log-probabilities of sequences, without ever holding the logits.

Shapes: N targets, d hidden size, V vocabulary, S sequences.
"""

from contextvars import copy_context
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trimtab.errors import UnsupportedModel
from trimtab.methods import AdapterLayer, Routing, current_routing, look_through, routed

TILE = 6_000_000
"""Logits formed at a time: 24 MB of float32, which stays in a last-level cache."""


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

    def logits(self, hidden: Tensor) -> Tensor:
        """N d -> N V, in at least float32."""
        raw = self.adapted(hidden[None])[0] if self.adapted is not None else hidden @ self.weight.T
        raw = raw.to(torch.promote_types(raw.dtype, torch.float32))
        if self.bias is not None and self.adapted is None:
            raw = raw + self.bias
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
    module = look_through(outer)
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


def sequence_logprobs(hidden: Tensor, head: Head, token: Tensor, sequence: Tensor, count: int) -> Tensor:
    """Σ log p(token | hidden) over each sequence's targets: S, at least float32.

    The gradient of each sequence's sum with respect to `hidden` is formed in the forward pass, a tile of logits at a
    time; the backward pass multiplies it by one number a sequence. That is exact for every loss that is a function of
    these sums, and costs two matrix products where recomputing the logits costs three.

    Args:
        hidden: N d, the hidden states that predict the targets.
        token: N, the targets.
        sequence: N, which sequence each target belongs to, in 0..count-1.

    An adapted head learns too, so its gradients need each tile's logits once more, in the backward pass.
    """
    if head.adapted is None:
        return _SequenceLogProbs.apply(hidden, head, token, sequence, count)
    routing, here = current_routing(), copy_context()
    rows = max(64, TILE // len(head.weight))
    parts = [torch.zeros(0, dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)]
    for start in range(0, len(hidden), rows):
        tile = slice(start, start + rows)
        part = Routing(routing.owners[tile]) if routing is not None else None
        parts.append(checkpoint(here.copy().run, _logprobs, hidden[tile], head, token[tile], part, use_reentrant=False))
    logprob = torch.cat(parts)
    return torch.zeros(count, dtype=logprob.dtype, device=hidden.device).index_add(0, sequence, logprob)


def _logprobs(hidden: Tensor, head: Head, token: Tensor, routing: Routing | None) -> Tensor:
    """log p(token | hidden): N. Run in the context of the forward pass, which says what acts, both times it is computed."""
    with routed(routing):
        logits = head.logits(hidden)
    return logits.gather(1, token[:, None])[:, 0] - logits.logsumexp(dim=1)


class _SequenceLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Head, token: Tensor, sequence: Tensor, count: int) -> Tensor:
        kind = torch.promote_types(hidden.dtype, torch.float32)
        logprob = torch.empty(len(hidden), dtype=kind, device=hidden.device)
        slope = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        rows = max(64, TILE // len(head.weight))
        for start in range(0, len(hidden), rows):
            tile = slice(start, start + rows)
            logits = head.logits(hidden[tile])
            chosen = logits.gather(1, token[tile, None])
            top = logits.amax(dim=1, keepdim=True)
            bend = None if head.softcap is None or slope is None else 1 - (logits / head.softcap) ** 2
            weights = logits.sub_(top).exp_()  # one exponential a logit serves the sum and the gradient
            total = weights.sum(dim=1, keepdim=True)
            logprob[tile] = (chosen - top - total.log())[:, 0]
            if slope is not None:
                gradient = weights.div_(-total)  # d log p(token) / d logits = onehot − softmax
                gradient.scatter_add_(1, token[tile, None], torch.ones_like(total))
                if bend is not None:
                    gradient *= bend
                slope[tile] = (gradient.to(hidden.dtype) @ head.weight) * head.scale
        ctx.save_for_backward(slope, sequence)
        return torch.zeros(count, dtype=kind, device=hidden.device).index_add_(0, sequence, logprob)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        slope, sequence = ctx.saved_tensors
        return slope * gradients[0][sequence, None].to(slope.dtype), None, None, None, None
