"""What an objective makes of several packs together: of an optimizer step, or of all held-out rows."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from trimtab.core.processes import processes
from trimtab.core.transfer import numbers_like
from trimtab.data import Pack
from trimtab.engine import PackCost, pack_logprobs
from trimtab.objectives._base import KL, Objective


class KLEstimate:
    """Collects log π / π_reference of mismatched answers, from which an objective estimates its KL divergence."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.log_ratios: list[Tensor] = []

    def add(self, pack: Pack, logprobs: Tensor) -> None:
        """
        Args:
            logprobs: Σ log p of each of the pack's mismatched answers.
        """
        logprobs = logprobs.detach()
        if logprobs.is_cpu:
            logprobs = logprobs.cpu().double()  # not every device has it
        self.log_ratios.append(logprobs - numbers_like([row.reference for row in pack.rows], logprobs))

    @cached_property
    def value(self) -> KL:
        """On all that were added."""
        return self.objective.kl_estimate(torch.cat(self.log_ratios) if self.log_ratios else torch.zeros(0))


@torch.no_grad()
def score_packs(model: Any, objective: Objective, packs: Sequence[Pack]) -> tuple[list[tuple[Pack, Tensor]], float]:
    """Each pack that has a loss, with Σ log p of its rows, on the host; and the objective's KL estimate on the others."""
    device = next(model.parameters()).device
    computed = processes.each(list(map(PackCost(model), packs)), lambda number: pack_logprobs(model, packs[number].to(device)))
    estimate, scored = KLEstimate(objective), list[tuple[Pack, Tensor]]()
    for pack, logprobs in zip(packs, computed, strict=True):
        if pack.mismatched:
            estimate.add(pack, logprobs)
        else:
            scored.append((pack, logprobs))
    return scored, float(estimate.value)


def mean_measures(measures: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """The mean of each measure over all packs."""
    names = list(dict.fromkeys(name for of_pack in measures for name in of_pack))
    values = {name: torch.cat([of_pack[name] for of_pack in measures if name in of_pack]) for name in names}
    return {name: float(value.cpu().double().mean()) for name, value in values.items() if len(value)}
