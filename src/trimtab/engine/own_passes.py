"""Rows by a model's own forward pass, each alone: the reference of the check, and by how much rounding makes it uncertain.

What rounding to 16 bits changes is measured: the same passes are computed in float32, with weights that are widened one module at a
time, because the whole model would take twice the memory.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.base.quantized import computing_in
from trimtab.core.attention import without_cudnn
from trimtab.core.errors import UnsupportedModel
from trimtab.core.wrapping import trunk_of, unwrap
from trimtab.engine.head import head_of
from trimtab.engine.products import HALF

DEVIATIONS = 4
"""In 16 bits, what Σ log p of n tokens may be off by: times √n, and what rounding makes of a token at most."""
ROUGH = 3e-2
"""In 16 bits, what Σ log p may be off by where rounding is not measured."""


class OwnPasses:
    """The log-probabilities of rows, each alone, by the model's own forward pass."""

    def __init__(self, model: Any, rows: Sequence[list[int]]) -> None:
        self.model, self.name, self.rows = model, type(model).__name__, rows
        self.exact = unwrap(model.get_input_embeddings()).weight.dtype in (torch.float32, torch.float64)
        self.tolerance = 1e-4 if self.exact else 2e-3
        """Of Σ log p: what it may be off by at least."""
        self.ratios: list[float] = []
        """Of logits and what the head's matrix makes of the trunk's hidden states, by row."""
        self.logprobs = [self._alone(ids) for ids in rows]

    def _logits(self, ids: list[int]) -> tuple[Tensor, Tensor | None]:
        """By the model's own forward pass, of each token but the last, on the CPU; and the trunk's hidden states, if it returns them."""
        tokens = torch.tensor([ids], device=next(self.model.parameters()).device)
        with (
            explained(self.name, "in its own forward pass", "does not run on plain text"),
            without_cudnn(),
            _recording(trunk_of(self.model)) as hidden,
        ):
            logits = self.model(input_ids=tokens, use_cache=False).logits
        return logits[0, :-1].cpu().double(), hidden[0][:-1] if hidden else None

    def _alone(self, ids: list[int]) -> Tensor:
        """log p of each token but the first."""
        logits, hidden = self._logits(ids)
        if hidden is not None:
            head = head_of(self.model)
            raw = head._replace(scale=1.0, softcap=None).logits(hidden.to(head.weight.dtype)).cpu().double()
            uncapped = logits if head.softcap is None else head.softcap * torch.atanh(logits / head.softcap)
            self.ratios.append(float((uncapped / raw).nanmedian()))
        logprobs = _of_tokens(logits, ids)
        if logprobs.isnan().any():
            dtype = str(self.model.dtype).removeprefix("torch.")
            raise UnsupportedModel(
                f"{self.name} gives NaN in {dtype}, in its own forward pass: its numbers overflow, or its weights are broken. "
                "Use another model.dtype: bfloat16 and float32 hold numbers beyond 65,504."
            )
        return logprobs

    @cached_property
    def _in_float32(self) -> list[Tensor] | None:
        """What `logprobs` are without the rounding to 16 bits; None for a model whose code is bound to its dtype."""
        try:
            with in_float32(self.model):
                return [_of_tokens(self._logits(ids)[0], ids) for ids in self.rows]
        except UnsupportedModel:
            return None

    def is_near(self, ours: Tensor, row: int, tokens: slice = slice(None)) -> bool:
        """Whether this is Σ log p of some of a row's tokens, but for rounding.

        What rounding to 16 bits changes is measured: by how much the log-probabilities of the tokens alone differ from those in float32.
        The largest of these differences counts, rather than their deviation: where a router chooses another expert, a few are far larger.
        """
        alone = self.logprobs[row][tokens].sum()
        if abs(ours - alone) <= abs(alone) * self.tolerance:
            return True
        if self.exact:
            return False
        if self._in_float32 is None:
            return bool(abs(ours - alone) <= abs(alone) * ROUGH)
        largest = torch.cat([a - b for a, b in zip(self.logprobs, self._in_float32, strict=True)]).abs().max()
        truth, count = self._in_float32[row][tokens].sum(), len(self.logprobs[row][tokens])
        return bool(abs(ours - truth) <= DEVIATIONS * largest * count**0.5)


def _of_tokens(logits: Tensor, ids: list[int]) -> Tensor:
    """log p of each token but the first."""
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Within the block, the model's own code computes in float32, with the values that its weights have."""
    handles, held = [], dict[int, list[tuple[Tensor, Tensor]]]()
    for module in model.modules():
        own = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None and t.dtype in HALF]
        if own:
            handles += [
                module.register_forward_pre_hook(partial(_widen, own, held)),
                module.register_forward_hook(partial(_restore, held), always_call=True),
            ]
    try:
        with computing_in(model, torch.float32):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _widen(own: list[Tensor], held: dict[int, list[tuple[Tensor, Tensor]]], module: nn.Module, given: Any) -> None:
    held[id(module)] = [(tensor, tensor.data) for tensor in own if tensor.dtype in HALF]
    for tensor, data in held[id(module)]:
        tensor.data = data.float()


def _restore(held: dict[int, list[tuple[Tensor, Tensor]]], module: nn.Module, given: Any, out: Any) -> None:
    for tensor, data in held.pop(id(module), []):
        tensor.data = data


@contextmanager
def _recording(trunk: torch.nn.Module) -> Iterator[list[Tensor]]:
    """The last hidden states that the trunk returns within the block, each T d."""
    seen: list[Tensor] = []

    def keep(module: object, given: object, out: Any) -> None:
        if isinstance(hidden := getattr(out, "last_hidden_state", None), Tensor):
            seen.append(hidden[0])

    handle = trunk.register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def explained(name: str, where: str, meaning: str) -> Iterator[None]:
    """Raise UnsupportedModel, with what it means, in place of whatever a model's own code raises."""
    try:
        yield
    except UnsupportedModel:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UnsupportedModel(f"{name} {meaning}: its code fails {where} ({type(error).__name__}: {reason}).") from error
