"""P-tuning: embeddings before every example, made by a small network while they are trained.

Liu et al. 2021, "GPT Understands, Too", arXiv:2103.10385, whose prompt encoder is a bidirectional LSTM and two layers with a
ReLU between them, or these layers alone.
"""

from typing import Annotated, Any, ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import nn

from trimtab.methods._virtual_tokens import DirectPrompt, NetworkTable, PromptLayer, Prompts, embedding_size


class PTuning(Prompts):
    """Trains a network that makes the input embeddings of virtual tokens; what it made is saved."""

    peft_type: ClassVar[str | None] = "P_TUNING"
    auto_lr: ClassVar[str] = "3e-4"
    inference_settings: ClassVar[dict[str, Any]] = {"width": 0}
    peft_table_settings: ClassVar[dict[str, Any]] = {
        "encoder_reparameterization_type": "MLP",
        "encoder_hidden_size": None,
        "encoder_num_layers": 2,
        "encoder_dropout": 0.0,
    }

    encoder: Literal["mlp", "lstm"] = "mlp"
    """The network: two layers that see each virtual token alone, or an LSTM over all of them, in both directions, before these."""
    width: Annotated[int, Field(ge=0)] = 512
    """Width of the network's hidden layers and of its inputs. 0 in a saved adapter, which holds what the network made."""

    def layer(self, base: nn.Module, path: str) -> PromptLayer:
        return NetworkPrompt(base, self.tokens, self.encoder, self.width) if self.width else DirectPrompt(base, self.tokens)

    def parameter_count(self, model: nn.Module) -> int:
        """tokens · w + (i + 1) · w + (w + 1) · d, with i = w; with an LSTM i = 2w and 16 w · (w + 1) more; saved, tokens · d."""
        w, d = self.width, embedding_size(model)
        read, lstm = (2 * w, 16 * w * (w + 1)) if self.encoder == "lstm" else (w, 0)
        return self.tokens * w + lstm + (read + 1) * w + (w + 1) * d if w else self.tokens * d


class NetworkPrompt(NetworkTable, PromptLayer):
    """Embeddings from a network with a ReLU."""

    def __init__(self, base: nn.Module, count: int, encoder: str, width: int) -> None:
        super().__init__(base, count)
        self.add_network(width, F.relu, lstm=encoder == "lstm")
