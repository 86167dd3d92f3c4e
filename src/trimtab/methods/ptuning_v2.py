"""P-tuning v2: keys and values before every example, in every layer, trained directly.

Liu et al. 2021, "P-Tuning v2: Prompt Tuning Can Be Comparable to Fine-tuning Universally Across Scales and Tasks",
arXiv:2110.07602, section 3.
"""

from typing import ClassVar

from torch import nn

from trimtab.methods._virtual_tokens import DirectPrefix, Prefixes


class PTuningV2(Prefixes):
    """Trains the keys and values of virtual tokens in every layer."""

    auto_lr: ClassVar[str] = "3e-2"

    def layer(self, base: nn.Module, path: str) -> DirectPrefix:
        return DirectPrefix(base, self.tokens)

    def parameter_count(self, model: nn.Module) -> int:
        """tokens · layers · 2 · key-value heads · head size."""
        return self.tokens * self.numbers(model)
