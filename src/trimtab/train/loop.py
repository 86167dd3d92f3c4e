"""The training loop: a generator that yields after each optimizer step.

Logging, evaluating, saving and stopping are the body of the caller's `for` loop, in the order they happen there.
"""

import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from trimtab.base import Base
from trimtab.core.determinism import deterministic
from trimtab.core.errors import DataError, NonFinite
from trimtab.core.process import never_keep_freed_memory
from trimtab.core.randomness import seeded
from trimtab.core.transfer import read
from trimtab.data import Pack
from trimtab.data.example import TokenRow
from trimtab.engine import ActivationArena, FrozenLayerCache, MemoryPlan, free_memory, pack_logprobs
from trimtab.methods import Attached, LearningRateContext, Method
from trimtab.objectives import KLEstimate, Objective, mean_measures
from trimtab.train.ahead import SentPacks, Steps
from trimtab.train.config import TrainConfig
from trimtab.train.loss_scale import LossScale
from trimtab.train.neftune import noisy_embeddings
from trimtab.train.optimizer import Optimizer
from trimtab.train.schedule import learning_rate

PATIENCE = 3
"""So many steps in a row that would be skipped end the run."""


@dataclass(frozen=True)
class Step:
    """What one optimizer step did."""

    number: int
    """From 1."""
    loss: float
    """The mean over the step's items, before the update."""
    items: float
    """What the loss was divided by: for SFT, the target tokens of the whole step, each as often as it weighs."""
    tokens: int
    """Tokens of the step's rows, all of them real."""
    computed: int
    """Tokens that were processed: shared prefixes once, and none after the last target."""
    seconds: float
    grad_norm: float
    """Before clipping."""
    lr: float
    measures: dict[str, float] = field(default_factory=dict)
    """The objective's other measures, as means over the step's rows."""
    skipped: str | None = None
    """Why the step was not taken: its loss or gradient is NaN or Inf."""
    loss_scale: float | None = None
    """By which the loss was multiplied for the backward pass, on a base model in float16."""

    @property
    def values(self) -> dict[str, Any]:
        """What is logged."""
        names = ("loss", "lr", "grad_norm", "items", "tokens", "computed")
        skipped = {"skipped": self.skipped} if self.skipped else {}
        scale = {"loss_scale": self.loss_scale} if self.loss_scale is not None else {}
        return (
            {name: getattr(self, name) for name in names} | {"took": round(self.seconds, 4)} | scale | skipped | self.measures
        )


def train(
    base: Base,
    adapter: Attached,
    objective: Objective,
    steps: Steps,
    config: TrainConfig,
    peak_lr: float,
    memory: MemoryPlan | None = None,
    optimizer: Optimizer | None = None,
) -> Iterator[Step]:
    """Train the adapter; yield after each optimizer step.

    Args:
        optimizer: The adapter's, after the steps that it has taken; a new one unless given.
        steps: The packs of each optimizer step.
        peak_lr: The learning rate after warm-up.
        memory: Says how much of each pack is computed again in its backward pass; nothing unless given.

    Raises:
        NonFinite: Losses or gradients are NaN or Inf in `PATIENCE` steps in a row; the adapter is as it was before them.
        KeyboardInterrupt: The adapter is as it was before the step; an interrupt during an update is raised when the next step is asked for.
        DataError: A step has no targets.
    """
    optimizer = optimizer or Optimizer(adapter, config.weight_decay, config.optimizer)
    passes, late_interrupt, skipped_in_a_row = _Passes(base, objective, steps, config, memory), None, 0
    optimizer.clear()
    for number in range(optimizer.taken + 1, len(steps) + 1):
        started = time.perf_counter()
        packs = passes.sent.take(number)
        lr = learning_rate(number, len(steps), peak_lr, config.warmup, config.schedule, config.floor, config.decay)
        items = sum(objective.items(pack) for pack in packs if not pack.mismatched)
        if items == 0:
            raise DataError(f"step {number}: none of its examples has a target token.")
        scale = replace(optimizer.loss_scale)
        adapter.train(not objective.needs_reference)
        loss, norm, means = passes.clipped_gradients(number, packs, items, optimizer, scale)
        adapter.train(False)
        rows = [row for pack in packs if not pack.mismatched for row in pack.rows]
        skipped_in_a_row = _count_skipped(skipped_in_a_row, skipped := _not_finite(number, loss, norm, rows))
        optimizer.loss_scale = optimizer.loss_scale if skipped else scale
        try:
            optimizer.skip() if skipped else optimizer.step(lr)
        except KeyboardInterrupt as error:
            late_interrupt = error
        counts = items, sum(row.full_length for row in rows), sum(len(pack.ids) for pack in packs)
        yield Step(number, loss, *counts, time.perf_counter() - started, norm, lr, means, skipped, scale.value)
        if late_interrupt is not None:
            raise late_interrupt
    optimizer.release()


class _Passes:
    """Forward and backward passes, with the arena and the cache that packs share."""

    def __init__(self, base: Base, objective: Objective, steps: Steps, config: TrainConfig, memory: MemoryPlan | None) -> None:
        never_keep_freed_memory()
        self.base, self.objective, self.seed, self.clip = base, objective, config.seed, config.clip
        self.sent = SentPacks(steps, base.device)
        self.memory, self.deterministic, self.neftune = memory, config.deterministic, config.neftune
        self.arena = ActivationArena(memory.arena_bytes * 1.01) if memory and base.device.type == "cpu" else None
        capacity = memory.frozen_cache_bytes if memory else free_memory(base.device) / 4
        self.frozen_cache = FrozenLayerCache(base.model, capacity) if config.keeps_frozen_outputs else None

    def clipped_gradients(
        self, number: int, packs: list[Pack], items: float, optimizer: Optimizer, scale: LossScale
    ) -> tuple[float, float, dict[str, float]]:
        """Make the gradients of a step, clip them, and return the loss, their norm before, and the means of other measures.

        What overflows in float16 is computed again, with a smaller `scale`.
        """
        while True:
            losses, measures = self.gradients(number, packs, items, scale)
            scale.unscale_(parameter.grad for parameter in optimizer.parameters)
            norm = optimizer.clip(self.clip)
            self.sent.send_ahead(number + 1)
            total, grad_norm, means = _read(losses, norm, measures)  # only here, the device is waited for
            if not scale.lower(total / items, grad_norm):
                return total / items, grad_norm, means
            optimizer.clear()

    def gradients(
        self, number: int, packs: list[Pack], items: float, scale: LossScale
    ) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        """Add the scaled gradients of a step's packs to the parameters', and return the losses and other measures."""
        with deterministic(self.deterministic):
            return self._gradients(number, packs, items, scale)

    def _gradients(
        self, number: int, packs: list[Pack], items: float, scale: LossScale
    ) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        device, measures, losses = self.base.device, list[dict[str, Tensor]](), list[Tensor]()
        estimate = KLEstimate(self.objective)
        for part, pack in enumerate(packs):
            with (
                seeded(_dropout_seed(self.seed, number, part), device),
                torch.set_grad_enabled(not pack.mismatched),
                noisy_embeddings(self.base.model, pack, self.neftune, self.seed, number),
            ):
                logprobs = self._logprobs(pack)
            if pack.mismatched:  # these come first: every loss of the step depends on them
                estimate.add(pack, logprobs)
                continue
            loss = self.objective.loss(logprobs, pack, estimate.value)
            scale.scaled(loss / items).backward()
            measures.append(self.objective.measures(logprobs.detach(), pack, estimate.value))
            losses.append(loss.detach())
        return losses, measures

    def _logprobs(self, pack: Pack) -> Tensor:
        recompute = self.memory.recomputed(pack) if self.memory is not None else "none"
        in_arena = self.arena is not None and torch.is_grad_enabled() and recompute == "none"
        with self.arena.reuse() if in_arena and self.arena else nullcontext():
            return pack_logprobs(self.base.model, pack, recompute=recompute, frozen_cache=self.frozen_cache)


def _read(
    losses: Sequence[Tensor], norm: Tensor, measures: Sequence[dict[str, Tensor]]
) -> tuple[float, float, dict[str, float]]:
    """The sum of the losses, the norm, and the means of the measures: by one read."""
    named = [(number, name, values) for number, of_pack in enumerate(measures) for name, values in of_pack.items()]
    *on_host, grad_norm = read([*losses, *(values for _, _, values in named), norm])
    found: list[dict[str, Tensor]] = [{} for _ in measures]
    for (number, name, _), values in zip(named, on_host[len(losses) :], strict=True):
        found[number][name] = values
    # In float64, which not every device has.
    return torch.stack(on_host[: len(losses)]).double().sum().item(), grad_norm.item(), mean_measures(found)


def peak_learning_rate(
    config: TrainConfig, base: Base, method: Method, objective: Objective, rows_per_step: float
) -> tuple[float, str]:
    """The learning rate after warm-up, and where it comes from."""
    if config.lr != "auto":
        return config.lr, "given"
    model = base.model.config.get_text_config()
    rate, basis = method.learning_rate(LearningRateContext(model.model_type, model.hidden_size, rows_per_step))
    shares = {part.name: part.lr_multiplier for part in (config.optimizer, objective) if part.lr_multiplier != 1.0}
    for name, share in shares.items():
        rate, basis = float(f"{rate * share:.2e}"), f"{basis}; times {share:g} for {name}"
    return rate, basis


def _dropout_seed(seed: int, step: int, part: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{part}".encode()).digest()[:7], "big")


def _count_skipped(in_a_row: int, skipped: str | None) -> int:
    """How many steps have been skipped in a row. Raises NonFinite if they are too many."""
    if skipped and in_a_row + 1 == PATIENCE:
        raise NonFinite(f"{skipped} It is the {PATIENCE}rd in a row. Lower train.lr, or look at those examples.")
    return in_a_row + 1 if skipped else 0


def _not_finite(number: int, loss: float, norm: float, rows: list[TokenRow]) -> str | None:
    """What to say of a step whose loss or gradient is NaN or Inf; None for others."""
    if math.isfinite(loss) and math.isfinite(norm):
        return None
    places = ", ".join(row.where for row in rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
    return f"Step {number}: the loss is {loss:g} and the gradient norm {norm:g}, so the step was not taken. Its examples: {places}."
