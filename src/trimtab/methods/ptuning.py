"""P-tuning: embeddings before every row, made by a small network while they are trained.

Liu et al. 2021, "GPT Understands, Too", arXiv:2103.10385, whose prompt encoder is a bidirectional LSTM and two layers with a
ReLU between them, or these layers alone.
"""

from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from trimtab.methods._base import LearningRateContext
from trimtab.methods._prompts import DirectPrompt, PromptLayer, Prompts, embedding_size
from trimtab.methods._virtual import number_type


class PTuning(Prompts):
    """Trains a network that makes the input embeddings of virtual tokens; what it made is saved."""

    peft_type: ClassVar[str | None] = "P_TUNING"
    as_folded: ClassVar[dict[str, Any]] = {"width": 0}
    of_peft: ClassVar[dict[str, Any]] = {
        "encoder_reparameterization_type": "MLP",
        "encoder_hidden_size": None,
        "encoder_num_layers": 2,
        "encoder_dropout": 0.0,
    }

    encoder: Literal["mlp", "lstm"] = "mlp"
    """The network: two layers that see each virtual token alone, or an LSTM over all of them, in both directions, before these."""
    width: Annotated[int, Field(ge=0)] = 512
    """Of the network's hidden layers, and of what it reads. 0 once it has been folded away, as it is when saved."""

    def layer(self, base: nn.Module, path: str) -> PromptLayer:
        return MadePrompt(base, self.tokens, self.encoder, self.width) if self.width else DirectPrompt(base, self.tokens)

    def parameter_count(self, model: nn.Module) -> int:
        """tokens · w + (i + 1) · w + (w + 1) · d, with i = w; with an LSTM i = 2w and 16 w · (w + 1) more; folded, tokens · d."""
        w, d = self.width, embedding_size(model)
        read, lstm = (2 * w, 16 * w * (w + 1)) if self.encoder == "lstm" else (w, 0)
        return self.tokens * w + lstm + (read + 1) * w + (w + 1) * d if w else self.tokens * d

    def learning_rate(self, at: LearningRateContext) -> tuple[float, str]:
        """3e-4, by a small search: see docs/methods.md."""
        return 3e-4, "3e-4"


class MadePrompt(PromptLayer):
    """table = start + relu(f(E) W₁ᵀ + b₁) W₂ᵀ + b₂, f an LSTM or nothing. W₂ and b₂ are zero at first, so it starts as `start`."""

    start: Tensor

    def __init__(self, base: nn.Module, count: int, encoder: str, width: int) -> None:
        super().__init__(base, count)
        kind, size = number_type(base), embedding_size(base)
        self.embedded = nn.Parameter(torch.randn(count, width, dtype=kind))
        self.lstm = nn.LSTM(width, width, bidirectional=True, dtype=kind) if encoder == "lstm" else None
        self.hidden = nn.Linear(2 * width if encoder == "lstm" else width, width, dtype=kind)
        self.out = nn.Linear(width, size, dtype=kind)
        self.register_buffer("start", torch.zeros(count, size, dtype=kind))

    def table(self) -> Tensor:
        return self.start + self.out(F.relu(self.hidden(self.read())))

    def read(self) -> Tensor:
        """f(E)."""
        if self.lstm is None:
            return self.embedded
        with torch.backends.cudnn.flags(
            enabled=False
        ):  # whose LSTM has gradients in training mode alone, and not always the same
            return self.lstm(self.embedded)[0]

    def start_as(self, table: Tensor) -> None:
        self.start.copy_(table)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
