"""The recipe's section `train`, and the learning rate at each step."""

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from trimtab.core.config import Config
from trimtab.engine import Recompute
from trimtab.train.optimizers import UpdateRule
from trimtab.train.optimizers.adamw import AdamW

Schedule = Literal["cosine", "linear", "constant"]

ROWS, STEPS = (4, 16), 60
"""Unless given, a step has as many rows as make so many steps, within these bounds. Measured: docs/decisions/034."""
EPOCHS, LEAST_STEPS = (2.0, 4.0), 30
"""Unless given, there are as many epochs as make so many steps, within these bounds."""


def _fraction(raw: Any) -> Any:
    if isinstance(raw, int | float) and not isinstance(raw, bool) and raw > 1:
        raise ValueError(f"expected a fraction of the steps, such as 0.05, got {raw:g}: it is not a number of steps.")
    return raw


class TrainConfig(Config):
    """How to train."""

    epochs: Literal["auto"] | Annotated[float, Field(gt=0, le=10_000)] = "auto"
    """How often each example is trained on; auto is 2, or up to 4 where that would make fewer than 30 steps."""
    rows_per_step: Annotated[int, Field(ge=1)] | None = None
    """The effective batch size in examples; unless given, 16, or down to 4 where that would make fewer than 60 steps."""
    tokens_per_step: Annotated[int, Field(ge=1)] | None = None
    """The effective batch size in tokens, instead of examples."""
    pack_tokens: Literal["auto"] | Annotated[int, Field(ge=16)] = "auto"
    """The most tokens of a micro-batch; auto is 1,024 on a CPU, and up to 32,768 on an accelerator, as far as they fit. More take memory and
    are a little faster; results are the same."""
    recompute: Recompute = "auto"
    """Gradient checkpointing: none, mlp (of the MLPs alone, which take most of the memory), full, or auto, which uses as little as
    micro-batches need to fit into memory."""
    lr: Literal["auto"] | Annotated[float, Field(gt=0)] = "auto"
    """Peak learning rate; auto is by the method's rule, times what the optimizer and the objective take, and the run prints it. The
    rules are in docs/methods.md."""
    schedule: Schedule = "cosine"
    """How the learning rate decays after its warm-up: to zero along a cosine or a line, or not at all."""
    warmup: Annotated[float, Field(ge=0, le=1), BeforeValidator(_fraction)] = 0.05
    """Fraction of the steps over which the learning rate rises from zero."""
    optimizer: Annotated[SerializeAsAny[UpdateRule], BeforeValidator(UpdateRule.pick)] = Field(default_factory=AdamW)
    """How gradients become updates: adamw, or one that holds less beside the parameters; see below."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled: at each step, the adapter's parameters shrink by this fraction, times the learning rate."""
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    """The largest norm of the gradient; a larger one is scaled down to it. null for no limit."""
    evaluate_every: Annotated[int, Field(ge=1)] | None = None
    """Steps between evaluations, after each of which a checkpoint is saved; a quarter of the run unless given."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of the adapter's initial values, the validation split, the order of examples and dropout."""
    deterministic: bool = False
    """Whether a GPU, too, gives the same adapter to the last bit when the run is repeated on the same card with the same versions. It
    takes the slower backward pass of attention, refuses operations without a deterministic algorithm, and needs `pack_tokens` and
    `recompute` to be given. See docs/gpu.md."""

    @model_validator(mode="after")
    def _one_measure(self) -> Any:
        if self.rows_per_step is not None and self.tokens_per_step is not None:
            raise ValueError("rows_per_step and tokens_per_step both set the effective batch size: give one of them.")
        return self

    @model_validator(mode="after")
    def _nothing_from_memory(self) -> Any:
        if self.deterministic and "auto" in (self.pack_tokens, self.recompute):
            raise ValueError(
                "deterministic: pack_tokens and recompute must be given, because auto depends on the memory that happens to be free; "
                "such as train.pack_tokens=1024 train.recompute=none."
            )
        return self

    @property
    def keeps_frozen_outputs(self) -> bool:
        """Whether frozen layers' outputs are kept for later epochs: how many depends on the free memory, their rounding on the pack."""
        return (self.epochs == "auto" or self.epochs > 1) and not self.deterministic

    def epochs_and_rows(self, rows: int) -> tuple[float, int | None]:
        """The epochs over so many rows, and the rows of a step; None if steps are measured in tokens."""
        epochs, rows_per_step = EPOCHS[0] if self.epochs == "auto" else self.epochs, self.rows_per_step
        if rows_per_step is None and self.tokens_per_step is None:
            rows_per_step = max(ROWS[0], min(ROWS[1], int(epochs * rows / STEPS)))
        if self.epochs == "auto" and rows_per_step is not None:
            epochs = max(EPOCHS[0], min(EPOCHS[1], float(math.ceil(LEAST_STEPS * rows_per_step / rows))))
        return epochs, rows_per_step


def learning_rate(step: int, steps: int, peak: float, warmup: float, schedule: Schedule) -> float:
    """The learning rate of optimizer step `step` (1-based) of `steps`: a pure function, so nothing is remembered."""
    rising = round(warmup * steps)
    if step <= rising:
        return peak * step / rising
    left = (steps - step + 1) / (steps - rising)  # 1 at the first step after the warm-up, 1 / (steps − rising) at the last
    return peak * {"cosine": 0.5 * (1 - math.cos(math.pi * left)), "linear": left, "constant": 1.0}[schedule]
