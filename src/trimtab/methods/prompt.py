"""Prompt tuning: embeddings before every example, trained directly.

Lester, Al-Rfou and Constant 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning", arXiv:2104.08691, section 2.
"""

from typing import Any, ClassVar

from torch import nn

from trimtab.methods._virtual_tokens import DirectPrompt, PromptLayer, Prompts, embedding_size


class PromptTuning(Prompts):
    """Trains the input embeddings of virtual tokens."""

    peft_type: ClassVar[str | None] = "PROMPT_TUNING"
    auto_lr: ClassVar[str] = "3e-2"
    peft_table_settings: ClassVar[dict[str, Any]] = {
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "tokenizer_name_or_path": None,
        "tokenizer_kwargs": None,
    }

    def layer(self, base: nn.Module, path: str) -> PromptLayer:
        return DirectPrompt(base, self.tokens)

    def parameter_count(self, model: nn.Module) -> int:
        """tokens · embedding size."""
        return self.tokens * embedding_size(model)
