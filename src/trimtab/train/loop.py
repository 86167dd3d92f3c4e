"""The training loop: a generator that yields after each optimizer step.

Logging, evaluating, saving and stopping are the body of the caller's `for` loop, in the order they happen there.
"""

import hashlib
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from trimtab.base import Base
from trimtab.core.determinism import deterministic
from trimtab.core.errors import DataError, NonFinite
from trimtab.core.process import never_keep_freed_memory
from trimtab.core.processes import processes
from trimtab.core.randomness import seeded
from trimtab.core.transfer import read
from trimtab.data import Pack
from trimtab.data.example import TokenRow
from trimtab.engine import ActivationArena, FrozenLayerCache, MemoryPlan, PackCost, free_memory, pack_logprobs
from trimtab.methods import Attached, LearningRateContext, Method
from trimtab.objectives import KL, KLEstimate, Objective, mean_measures
from trimtab.train.ahead import SentPacks, StepPacks, Steps
from trimtab.train.config import TrainConfig
from trimtab.train.loss_scale import LossScale
from trimtab.train.neftune import noisy_embeddings
from trimtab.train.optimizer import Optimizer
from trimtab.train.schedule import learning_rate

PATIENCE = 3
"""So many steps in a row that would be skipped end the run."""
LOSS = "loss"
Computed = dict[int, dict[str, Tensor]]
"""Of packs, by their numbers in the step, the loss and other measures."""


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
    waited: float | None = None
    """Seconds of this process in exchanges with others, the sum of the gradients among them; None if there are no others."""

    @property
    def values(self) -> dict[str, Any]:
        """What is logged."""
        names = ("loss", "lr", "grad_norm", "items", "tokens", "computed")
        more: dict[str, Any] = {
            "loss_scale": self.loss_scale,
            "waited": None if self.waited is None else round(self.waited, 4),
            "skipped": self.skipped,
        }
        always = {name: getattr(self, name) for name in names} | {"took": round(self.seconds, 4)}
        return always | {name: value for name, value in more.items() if value is not None} | self.measures


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
        steps: The packs of each optimizer step, which several processes divide; all yield the same.
        peak_lr: The learning rate after warm-up.
        memory: Says how much of each pack is computed again in its backward pass; nothing unless given.

    Raises:
        NonFinite: Losses or gradients are NaN or Inf in `PATIENCE` steps in a row; the adapter is as it was before them.
        KeyboardInterrupt: The adapter is as it was before the step; an interrupt during an update, or of another process, is raised when
            the next step is asked for.
        DataError: A step has no targets.
    """
    optimizer = optimizer or Optimizer(adapter, config.weight_decay, config.optimizer)
    passes, late_interrupt, skipped_in_a_row = _Passes(base, objective, steps, config, memory), None, 0
    optimizer.clear()
    for number in range(optimizer.taken + 1, len(steps) + 1):
        if late_interrupt is not None or processes.told_to_stop:
            raise late_interrupt or KeyboardInterrupt
        started, waited = time.perf_counter(), processes.waited
        packs = passes.sent.take(number)
        lr = learning_rate(number, len(steps), peak_lr, config.warmup, config.schedule, config.floor, config.decay)
        if (items := sum(objective.items(pack) for pack in packs.all if not pack.mismatched)) == 0:
            raise DataError(f"step {number}: none of its examples has a target token.")
        scale = replace(optimizer.loss_scale)
        loss, norm, means = passes.clipped_gradients(number, packs, items, optimizer, scale)
        skipped_in_a_row = _count_skipped(skipped_in_a_row, skipped := _not_finite(number, loss, norm, packs.rows))
        optimizer.loss_scale = optimizer.loss_scale if skipped else scale
        try:
            optimizer.skip() if skipped else optimizer.step(lr)
        except KeyboardInterrupt as error:
            late_interrupt = error
        counts = items, packs.tokens, packs.computed
        spent = time.perf_counter() - started, processes.waited - waited if processes.size > 1 else None
        yield Step(number, loss, *counts, spent[0], norm, lr, means, skipped, scale.value, spent[1])
    if late_interrupt is not None:
        raise late_interrupt
    optimizer.release()


class _Passes:
    """Forward and backward passes, with the arena and the cache that packs share."""

    def __init__(self, base: Base, objective: Objective, steps: Steps, config: TrainConfig, memory: MemoryPlan | None) -> None:
        never_keep_freed_memory()
        self.base, self.objective, self.seed, self.clip = base, objective, config.seed, config.clip
        self.sent = SentPacks(steps, base.device, PackCost(base.model))
        self.memory, self.deterministic, self.neftune = memory, config.deterministic, config.neftune
        self.arena = ActivationArena(memory.arena_bytes * 1.01) if memory and base.device.type == "cpu" else None
        capacity = memory.frozen_cache_bytes if memory else free_memory(base.device) / 4
        # Where shards are gathered, no process may skip a layer that others compute.
        keeps = config.keeps_frozen_outputs and not processes.equal_passes
        self.frozen_cache = FrozenLayerCache(base.model, capacity) if keeps else None

    def clipped_gradients(
        self, number: int, packs: StepPacks, items: float, optimizer: Optimizer, scale: LossScale
    ) -> tuple[float, float, dict[str, float]]:
        """Make the gradients of a step, clip them, and return the loss, their norm before, and the means of other measures.

        What overflows in float16 is computed again, with a smaller `scale`.
        """
        while True:
            optimizer.adapter.train(not self.objective.needs_reference)
            computed = self.gradients(number, packs, items, scale)
            optimizer.adapter.train(False)
            optimizer.sum_gradients()
            scale.unscale_(parameter.grad for parameter in optimizer.parameters)
            norm = optimizer.clip(self.clip)
            self.sent.send_ahead(number + 1)
            total, grad_norm, means = _read(computed, norm)  # only here, the device is waited for
            if not scale.lower(total / items, grad_norm):
                return total / items, grad_norm, means
            optimizer.clear()

    def gradients(self, number: int, packs: StepPacks, items: float, scale: LossScale) -> Computed:
        """Add the scaled gradients of this process's packs of a step to the parameters', and return the losses and other measures."""
        with deterministic(self.deterministic):
            estimate = self._estimate(number, packs)
            computed: Computed = {}
            for part, pack, is_own in packs.turns(mismatched=False):
                logprobs = self._logprobs(number, part, pack)
                loss = self.objective.loss(logprobs, pack, estimate)
                scale.scaled((loss if is_own else 0.0 * loss) / items).backward()
                if is_own:
                    measures = self.objective.measures(logprobs.detach(), pack, estimate)
                    computed[part] = {LOSS: loss.detach(), **measures}
            return computed

    def _estimate(self, number: int, packs: StepPacks) -> KL:
        """The objective's KL estimate on the mismatched answers of the whole step, on which every loss of it depends."""
        estimate, own = KLEstimate(self.objective), dict[str, Tensor]()
        for part, pack, is_own in packs.turns(mismatched=True):
            with torch.no_grad():
                logprobs = self._logprobs(number, part, pack)
            if is_own:
                own[str(part)] = logprobs
        gathered = processes.gather(own) if packs.mismatched else own
        for part in packs.mismatched:
            estimate.add(packs.all[part], gathered[str(part)])
        return estimate.value

    def _logprobs(self, number: int, part: int, pack: Pack) -> Tensor:
        """Σ log p of the rows of a pack, the one of this number in the step, whichever process computes it."""
        recompute = self.memory.recomputed(pack) if self.memory is not None else "none"
        in_arena = self.arena is not None and torch.is_grad_enabled() and recompute == "none"
        with (
            seeded(_dropout_seed(self.seed, number, part), self.base.device),
            noisy_embeddings(self.base.model, pack, self.neftune, self.seed, number),
            self.arena.reuse() if in_arena and self.arena else nullcontext(),
        ):
            return pack_logprobs(self.base.model, pack, recompute=recompute, frozen_cache=self.frozen_cache)


def _read(computed: Computed, norm: Tensor) -> tuple[float, float, dict[str, float]]:
    """The sum of the losses of the step, the norm, and the means of the measures: by one read, and by one exchange."""
    names = [f"{part}/{name}" for part, of_pack in computed.items() for name in of_pack]
    *on_host, grad_norm = read([*(values for of_pack in computed.values() for values in of_pack.values()), norm])
    gathered, found = processes.gather(dict(zip(names, on_host, strict=True))), dict[int, dict[str, Tensor]]()
    for name, values in gathered.items():
        part, _, measure = name.partition("/")
        found.setdefault(int(part), {})[measure] = values
    in_order = [found[part] for part in sorted(found)]
    losses = torch.stack([of_pack.pop(LOSS) for of_pack in in_order]).double()  # in float64, which not every device has
    return losses.sum().item(), grad_norm.item(), mean_measures(in_order)


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
