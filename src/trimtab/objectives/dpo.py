"""Direct preference optimization: make chosen answers likelier than rejected ones, measured by a reference model."""

from typing import Annotated, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from trimtab.objectives._comparing import Comparing
from trimtab.objectives._pairs import Answers, Pairwise


class DPO(Comparing, Pairwise):
    """Of two answers, make the chosen one likelier than the rejected one, by more than a reference model does.

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
    """How dearly the model pays for leaving the reference; of ipo, τ."""
    loss_type: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """The function of the margin."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """The share ε of pairs that are thought to be the wrong way round; of sigmoid alone."""
    sft: Annotated[float, Field(ge=0)] = 0.0
    """How much the chosen answers are learned beside that, as in supervised fine-tuning."""

    @model_validator(mode="after")
    def _smoothing_of_sigmoid(self) -> Self:
        if self.label_smoothing and self.loss_type != "sigmoid":
            raise ValueError(f"label_smoothing does nothing for {self.loss_type}: it is of sigmoid alone. Leave it out.")
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
