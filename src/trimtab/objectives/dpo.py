"""Direct preference optimization: make chosen answers more likely than rejected ones, compared with a reference model."""

from typing import Annotated, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from trimtab.objectives._base import ReferenceObjective
from trimtab.objectives._pairs import Answers, Pairwise


class DPO(ReferenceObjective, Pairwise):
    """Of two answers, make the chosen one more likely than the rejected one, by more than in a reference model.

    With Δ(y) = log π(y) / π_reference(y) and m = β (Δ(chosen) − Δ(rejected)), over pairs:

    * sigmoid: −(1 − ε) log σ(m) − ε log σ(−m) (Rafailov et al. 2023, arXiv:2305.18290, eq. 7; ε: Mitchell 2023, "A note on DPO with
      noisy preferences")
    * hinge: max(0, 1 − m) (SLiC, Zhao et al. 2023, arXiv:2305.10425, with a reference)
    * ipo: (Δ(chosen)/tokens − Δ(rejected)/tokens − 1/(2β))² (Azar et al. 2023, arXiv:2310.12036, eq. 17; by tokens, as its
      authors computed it)

    plus sft · −log π(chosen)/tokens.
    """

    lr_multiplier: ClassVar[float] = 0.1

    beta: Annotated[float, Field(gt=0)] = 0.1
    """Strength of the penalty for deviating from the reference model; of ipo, τ."""
    loss_type: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """The function of the margin."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """The assumed share ε of pairs whose answers are swapped; for sigmoid alone."""
    sft: Annotated[float, Field(ge=0)] = 0.0
    """Weight of supervised fine-tuning on the chosen answers beside that."""

    @model_validator(mode="after")
    def _check_smoothing(self) -> Self:
        if self.label_smoothing and self.loss_type != "sigmoid":
            raise ValueError(f"label_smoothing does nothing for {self.loss_type}: it is for sigmoid alone. Leave it out.")
        return self

    def pair_losses(self, chosen: Answers, rejected: Answers) -> Tensor:
        margin = self.reward(chosen) - self.reward(rejected)
        if self.loss_type == "sigmoid":
            smooth = self.label_smoothing
            losses = -(1 - smooth) * F.logsigmoid(margin) - smooth * F.logsigmoid(-margin)
        elif self.loss_type == "hinge":
            losses = torch.relu(1 - margin)
        else:
            by_token = chosen.ratio / chosen.tokens - rejected.ratio / rejected.tokens
            losses = (by_token - 1 / (2 * self.beta)) ** 2
        return losses - self.sft * chosen.mean if self.sft else losses

    def reward(self, answers: Answers) -> Tensor:
        return self.beta * answers.ratio
