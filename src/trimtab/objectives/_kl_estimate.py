"""What an objective makes of several packs together: of an optimizer step, or of all held-out rows."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.data import Pack
from trimtab.engine import pack_logprobs
from trimtab.objectives._base import Objective


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
        reference = torch.tensor([row.reference for row in pack.rows], dtype=torch.float64)
        self.log_ratios.append(logprobs.detach().cpu().double() - reference)

    @property
    def value(self) -> float:
        return self.objective.kl_estimate(torch.cat([torch.zeros(0), *self.log_ratios]))


@torch.no_grad()
def score_packs(model: Any, objective: Objective, packs: Sequence[Pack]) -> tuple[list[tuple[Pack, Tensor]], float]:
    """Each pack that has a loss, with Σ log p of its rows; and the objective's KL estimate on the others."""
    estimate, scored, device = KLEstimate(objective), list[tuple[Pack, Tensor]](), next(model.parameters()).device
    for pack in packs:
        logprobs = pack_logprobs(model, pack.to(device))  # one pack at a time is on the device
        if pack.mismatched:
            estimate.add(pack, logprobs)
        else:
            scored.append((pack, logprobs))
    return scored, estimate.value


def mean_measures(measures: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """The mean of each measure over all packs."""
    names = list(dict.fromkeys(name for of_pack in measures for name in of_pack))
    values = {name: torch.cat([of_pack[name] for of_pack in measures if name in of_pack]) for name in names}
    return {name: float(value.cpu().double().mean()) for name, value in values.items() if len(value)}
