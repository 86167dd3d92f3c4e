"""What a method's learning rate may depend on, and the rule that several share."""

from typing import NamedTuple


class LearningRateContext(NamedTuple):
    """What the formula behind `lr: auto` may depend on."""

    model_type: str
    """The architecture's name in Transformers, such as "llama"."""
    hidden_size: int
    rows_per_step: float

    def in_small_steps(self, rate: str) -> tuple[float, str]:
        """A rate found with 16 examples per step, which overshoots with fewer: it falls in proportion (docs/decisions/052)."""
        found = float(rate) * min(1.0, self.rows_per_step / 16)
        return float(f"{found:.2e}"), f"{rate}·({self.rows_per_step:.3g} examples per step/16), at most {rate}"
