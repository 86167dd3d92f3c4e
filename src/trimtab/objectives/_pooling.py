"""What an objective says of several packs at once: of an optimizer step's, or of all rows held out."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.data import Pack
from trimtab.engine import pack_logprobs
from trimtab.objectives._base import Objective


@torch.no_grad()
def learned_and_pooled(model: Any, objective: Objective, packs: Sequence[Pack]) -> tuple[list[Pack], float]:
    """The packs that have a loss, and the number that the objective estimates on the others, of mismatched answers."""
    others = [pack for pack in packs if pack.sequences[0].side == "mismatched"]
    differences = [
        (
            pack_logprobs(model, pack).double().cpu()
            - torch.tensor([row.reference for row in pack.sequences], dtype=torch.float64)
        )
        for pack in others
    ]
    learned = [pack for pack in packs if pack.sequences[0].side != "mismatched"]
    return learned, objective.pool(torch.cat(differences)) if differences else 0.0


def averaged(measured: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """The mean of each measure over all packs."""
    names = list(dict.fromkeys(name for one in measured for name in one))
    values = {name: torch.cat([one[name] for one in measured if name in one]) for name in names}
    return {name: float(value.double().mean()) for name, value in values.items() if len(value)}
