"""The language model head: from hidden states to log-probabilities of rows, without holding all logits.

Shapes: M tokens that predict, N targets (a token has several where rows diverge), d hidden size, V vocabulary, S rows.
"""

from contextvars import copy_context
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trimtab.core.attention import at_least_float32
from trimtab.core.errors import UnsupportedModel
from trimtab.core.transfer import to_device
from trimtab.data.pack import Pack
from trimtab.engine.backends import backend_for
from trimtab.engine.pass_mode import mode_of
from trimtab.engine.products import has_float32_results, sums_of_products
from trimtab.engine.sums import SumOrder, add_sums_, sum_order
from trimtab.methods import AdapterLayer, Routing, current_routing, routed, unwrap

TILE = 500_000
"""Logits formed at a time: 2 MB of float32, which stay in a cache."""
ROWS = 64
"""Rows of logits formed at a time, at least, by an adapted head: it computes with whole rows."""
SPLIT_ROWS, SPLIT_LOGITS = 2_048, 320_000_000
"""Rows of logits formed at a time where they are formed over the whole vocabulary, and logits; a quarter of that with temporaries."""


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

    @property
    def is_product(self) -> bool:
        """Whether logits are nothing but hidden Wᵀ."""
        return self.adapted is None and self.bias is None and self.scale == 1.0 and self.softcap is None

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


class Targets(NamedTuple):
    """What hidden states are to predict."""

    at: Tensor
    """N, the index of the one that predicts each target."""
    token: Tensor
    """N, the targets."""
    row: Tensor
    """N, the row of each, in 0..rows-1."""
    rows: int
    """S."""
    on_host: "Targets | None" = None
    """The same on the host, if they are on a device."""
    weight: Tensor | None = None
    """N, on the host: by which each log p is multiplied; None if all are 1."""

    @classmethod
    def of(cls, pack: Pack) -> "Targets":
        """Those of the pack, for the hidden states of `pack.predicts`."""
        host = cls.of(pack.host) if pack.on_host is not None else None
        return cls(pack.place, pack.target_token, pack.target_row, len(pack.rows), host, pack.target_weight)

    @property
    def host(self) -> "Targets":
        return self.on_host or self

    def to(self, device: torch.device) -> "Targets":
        at, token, row = (to_device(tensor, device) for tensor in (self.at, self.token, self.row))
        return Targets(at, token, row, self.rows, self.host, self.weight)

    def weighted(self, values: Tensor) -> Tensor:
        """Values of the targets, times their weights: N."""
        return values if self.weight is None else values * to_device(self.weight.to(values.dtype), values.device)


def sequence_logprobs(hidden: Tensor, head: Head, targets: Targets) -> Tensor:
    """Σ weight · log p(token | hidden) over each row's targets: M d -> S, at least float32.

    One pass over the vocabulary, a tile of logits at a time, computes a running softmax (Milakov & Gimelshein 2018,
    arXiv:1805.02867) and the mean row of the head's matrix that the gradient needs. The backward pass then has the gradient of
    each sum up to a factor, which is exact for every loss that is a function of these sums, and costs two matrix products
    where recomputing the logits costs three. An adapted head is trained too, so its backward pass recomputes each tile.

    A tile is a part of the vocabulary for all hidden states on a CPU, and some of these for the whole vocabulary elsewhere.

    Raises:
        IndexError: A target is beyond the vocabulary.
    """
    if head.adapted is None:
        return _SequenceLogProbs.apply(hidden, head, targets)
    routing, context = current_routing(), copy_context()
    splits, dtype = _splits_rows(hidden), hidden.dtype
    rows = _rows_of(head) if splits else max(ROWS, TILE // len(head.weight))
    hidden = at_least_float32(hidden)  # in which the gradients of a token's targets are summed
    parts, at = [hidden.new_zeros(0)], targets.host.at
    for start in range(0, len(at), rows):
        tile = slice(start, start + rows)
        part = routing.select(at[tile].tolist()) if routing is not None else None
        arguments = hidden[targets.at[tile]].to(dtype), head, targets.token[tile], part
        parts.append(checkpoint(context.copy().run, _logprobs, *arguments, use_reentrant=False))
    return _by_row(torch.cat(parts), targets, splits)


def _logprobs(hidden: Tensor, head: Head, token: Tensor, routing: Routing | None) -> Tensor:
    """log p(token | hidden): N. Runs both times in the context of the forward pass, which says which adapters are on."""
    with routed(routing):
        logits = head.logits(hidden)
    return logits.log_softmax(dim=1).gather(1, token[:, None])[:, 0]


def _splits_rows(hidden: Tensor) -> bool:
    return backend_for(hidden).splits_rows(hidden)


def _rows_of(head: Head) -> int:
    """How many rows of logits are formed at a time over the whole vocabulary."""
    most = SPLIT_LOGITS if head.is_product else SPLIT_LOGITS // 4
    return max(ROWS, min(SPLIT_ROWS, most // len(head.weight) // ROWS * ROWS))


class _Tile(NamedTuple):
    """Some of the hidden states, and a part of the vocabulary; and the targets whose logits are in it."""

    rows: slice
    columns: slice
    targets: slice
    """Of the targets in the order of the tiles."""


class _Tiles(NamedTuple):
    """The order in which logits are formed."""

    tiles: list[_Tile]
    order: Tensor
    """N, the targets in the order of the tiles, …"""
    row: Tensor
    """… and where their logits are in their tiles."""
    column: Tensor

    @classmethod
    def plan(cls, hidden: Tensor, head: Head, targets: Targets, splits: bool) -> "_Tiles":
        count, vocabulary = len(hidden), len(head.weight)
        rows, columns = (_rows_of(head), vocabulary) if splits else (max(1, count), max(1, TILE // max(1, count)))
        at, token = targets.host.at.numpy(), targets.host.token.numpy()
        if (largest := int(token.max(initial=0))) >= vocabulary:
            raise IndexError(f"token {largest} is beyond the head's {vocabulary}")
        across, down = -(-vocabulary // columns), -(-count // rows)
        tile = at // rows * across + token // columns
        order = tile.argsort(kind="stable")
        cuts = np.searchsorted(tile[order], np.arange(across * down + 1)).tolist()
        starts = ((row * rows, column * columns) for row in range(down) for column in range(across))
        tiles = [
            _Tile(slice(row, min(row + rows, count)), slice(column, min(column + columns, vocabulary)), slice(low, high))
            for (row, column), (low, high) in zip(starts, pairwise(cuts), strict=True)
        ]
        places = np.stack([order, (at % rows)[order], (token % columns)[order]])
        return cls(tiles, *to_device(torch.from_numpy(places), hidden.device).unbind())


class _SequenceLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Head, targets: Targets) -> Tensor:
        dtype, backward, splits = (
            torch.promote_types(hidden.dtype, torch.float32),
            ctx.needs_input_grad[0],
            _splits_rows(hidden),
        )
        top = torch.full((len(hidden),), torch.finfo(dtype).min, dtype=dtype, device=hidden.device)
        total, chosen = torch.zeros_like(top), top.new_zeros(len(targets.at))
        mean = torch.zeros_like(hidden, dtype=dtype) if backward else None  # else bfloat16 would round it once a tile
        plan, buffer = _Tiles.plan(hidden, head, targets, splits), None
        for rows, columns, which in plan.tiles:
            size = (rows.stop - rows.start) * (columns.stop - columns.start)
            buffer = hidden.new_empty(size) if buffer is None else buffer
            tile = buffer[:size].view(rows.stop - rows.start, -1)
            in_place = splits and head.is_product  # perhaps in few bits, of which the softmax makes others
            logits = torch.mm(hidden[rows], head.weight.T, out=tile) if in_place else head.logits(hidden[rows], columns, tile)
            chosen[which] = logits[plan.row[which], plan.column[which]].to(dtype)
            cap_slope = 1 - (logits / head.softcap) ** 2 if head.softcap is not None and backward else None
            # Afterwards the logits are exp(logits − top).
            rescale = backend_for(logits, top, total).softmax_tile_(logits, top[rows], total[rows])
            if mean is not None:
                if columns.start:
                    mean[rows].mul_(rescale[:, None])
                weights = logits if cap_slope is None else logits * cap_slope
                _add_product_(mean[rows], weights.to(hidden.dtype), head.weight[columns])
        chosen = torch.empty_like(chosen).index_copy_(0, plan.order, chosen)
        at = targets.at
        logprob = (chosen - top[at]) - total.log()[at]  # in this order, so that no digit of a log p near 0 is lost to `top`
        if mean is not None:
            mean.div_(total[:, None])
            slope = None if head.softcap is None else 1 - (chosen / head.softcap) ** 2
            ctx.head, ctx.dtype, ctx.targets, ctx.splits = head, hidden.dtype, targets, splits
            ctx.save_for_backward(mean, slope)
        return _by_row(logprob, targets, splits)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """d log p(token) / d hidden = scale · (cap slope of token · its row of the head − Σ p · cap slope · rows of the head)."""
        mean, slope = ctx.saved_tensors
        at, token, row = ctx.targets[:3]
        order = sum_order(ctx.targets.host.at.numpy(), mean.device) if ctx.splits else None
        dtarget = ctx.targets.weighted(gradients[0][row] * ctx.head.scale)
        dlogit = dtarget if slope is None else dtarget * slope
        values = ctx.head.weight[token] * dlogit[:, None]
        dx = mean * -_add_(torch.zeros_like(mean[:, 0]), at, dtarget, order)[:, None]
        return _add_(dx, at, values, order).to(ctx.dtype), None, None


def _by_row(logprob: Tensor, targets: Targets, splits: bool) -> Tensor:
    """The weighted sums over each row's targets: N -> S."""
    order = sum_order(targets.host.row.numpy(), logprob.device) if splits else None
    return _add_(logprob.new_zeros(targets.rows), targets.row, targets.weighted(logprob), order)


def _add_(to: Tensor, index: Tensor, values: Tensor, order: SumOrder | None) -> Tensor:
    """to[index] += values, of which several may have the same index. With an order, they are added in it, and written over."""
    return to.index_add_(0, index, values) if order is None else add_sums_(to, values, order)


def _add_product_(to: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """to + a @ b, in place, where a and b may have fewer bits: their product is rounded if a copy of them could alone prevent it."""
    if to.dtype == a.dtype:
        return to.addmm_(a, b)
    return to.add_(sums_of_products(a, b) if has_float32_results(a.device.type) else a @ b)
