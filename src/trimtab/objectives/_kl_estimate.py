"""What an objective says of several packs at once: of an optimizer step's, or of all rows held out."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from trimtab.data import Pack
from trimtab.engine import Earlier, pack_logprobs
from trimtab.objectives._base import Objective


class Pool:
    """Gathers what an objective estimates on mismatched answers."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.differences: list[Tensor] = []

    def add(self, pack: Pack, logprobs: Tensor) -> None:
        """Σ log p of each of the pack's mismatched answers."""
        reference = torch.tensor([row.reference for row in pack.sequences], dtype=torch.float64)
        self.differences.append(logprobs.detach().cpu().double() - reference)

    def pass_through(self, model: Any, pack: Pack, within: AbstractContextManager[None] | None = None, **how: Any) -> Tensor:
        """Σ log p of each of the pack's sequences; mismatched answers that go on from them are gathered.

        Args:
            within: Where the pack's own pass happens.
            how: As in `pack_logprobs`.
        """
        earlier: Earlier = {}
        with nullcontext() if within is None else within:
            logprobs = pack_logprobs(model, pack, earlier=earlier if pack.after is not None else None, **how)
        if pack.after is not None:
            with torch.no_grad():
                self.add(pack.after, pack_logprobs(model, pack.after, earlier=earlier))
        return logprobs

    @property
    def value(self) -> float:
        """The number that is pooled, from all that has been gathered."""
        return self.objective.pool(torch.cat([torch.zeros(0), *self.differences]))


@torch.no_grad()
def answered(model: Any, objective: Objective, packs: Sequence[Pack]) -> tuple[list[tuple[Pack, Tensor]], float]:
    """The packs that have a loss, each with Σ log p of its sequences; and the number that the objective estimates on the others."""
    pool, learned, device = Pool(objective), list[tuple[Pack, Tensor]](), next(model.parameters()).device
    for pack in packs:
        logprobs = pool.pass_through(model, pack.to(device))  # one at a time is there
        if pack.mismatched:
            pool.add(pack, logprobs)
        else:
            learned.append((pack, logprobs))
    return learned, pool.value


def averaged(measured: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """The mean of each measure over all packs."""
    names = list(dict.fromkeys(name for one in measured for name in one))
    values = {name: torch.cat([one[name] for one in measured if name in one]) for name in names}
    return {name: float(value.cpu().double().mean()) for name, value in values.items() if len(value)}
