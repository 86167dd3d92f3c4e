"""The recipe's section `train`."""

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from trimtab.core.config import Config
from trimtab.engine import Recompute
from trimtab.train.optimizers import UpdateRule
from trimtab.train.optimizers.adamw import AdamW
from trimtab.train.schedule import ENDS, Schedule, Share

ROWS, STEPS = (4, 16), 60
"""Unless given, a step has as many rows as make so many steps, within these bounds. Measured: docs/decisions/034."""
EPOCHS, LEAST_STEPS = (2.0, 4.0), 30
"""Unless given, there are as many epochs as make so many steps, within these bounds."""


class TrainConfig(Config):
    """How to train."""

    epochs: Literal["auto"] | Annotated[float, Field(gt=0, le=10_000)] = "auto"
    """How often each example is trained on; auto is 2, or up to 4 where that would make fewer than 30 steps."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """The most optimizer steps. Without `epochs`, the run has exactly so many; with both, the one that comes first ends it."""
    rows_per_step: Annotated[int, Field(ge=1)] | None = None
    """The effective batch size in examples; unless given, 16, or down to 4 where that would make fewer than 60 steps."""
    tokens_per_step: Annotated[int, Field(ge=1)] | None = None
    """The effective batch size in tokens, instead of examples."""
    pack_tokens: Literal["auto"] | Annotated[int, Field(ge=16)] = "auto"
    """The most tokens of a micro-batch; auto is 1,024 on a CPU, and up to 32,768 on an accelerator, as far as they fit, and with several
    processes no more than lets them divide each step evenly. More take memory and are a little faster; results are the same."""
    recompute: Recompute = "auto"
    """Gradient checkpointing: none, mlp (of the MLPs alone, which take most of the memory), full, or auto, which uses as little as
    micro-batches need to fit into memory."""
    lr: Literal["auto"] | Annotated[float, Field(gt=0)] = "auto"
    """Peak learning rate; auto is by the method's rule, times what the optimizer and the objective take, and the run prints it. The
    rules are in docs/methods.md."""
    schedule: Schedule = "cosine"
    """How the learning rate decays after its warm-up: along a cosine or a line, not at all, with the inverse square root of the step, or
    (wsd: warm-up, stable, decay) along a cosine that begins late."""
    warmup: Share = 0.05
    """Over which part of the run the learning rate rises from zero: a fraction of the steps (below 1), or a number of them."""
    floor: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The fraction of the peak to which a cosine, a line or wsd decays."""
    decay: Share | None = None
    """Of wsd: the last part of the run, in which it decays, as a fraction or a number of steps; 0.2 unless given."""
    optimizer: Annotated[SerializeAsAny[UpdateRule], BeforeValidator(UpdateRule.pick)] = Field(default_factory=AdamW)
    """How gradients become updates: adamw, or one that holds less beside the parameters; see below."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled: at each step, the adapter's parameters shrink by this fraction, times the learning rate."""
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    """The largest norm of the gradient; a larger one is scaled down to it. null for no limit."""
    evaluate_every: Annotated[int, Field(ge=1)] | None = None
    """Steps from one evaluation to the next; a quarter of the run unless given. An adapter that is the best so far is saved."""
    save_every: Annotated[int, Field(ge=1)] | None = None
    """Steps from one checkpoint to the next; as `evaluate_every` unless given."""
    keep: Annotated[int, Field(ge=1)] = 2
    """How many checkpoints are kept, the newest ones, besides the best."""
    patience: Annotated[int, Field(ge=1)] | None = None
    """Ends the run after so many evaluations in a row without an improvement of the validation loss, one beyond noise: the 95 % interval of
    the difference, on the same examples, has to lie below zero. The adapter of the run is the best one even so. The learning rate has
    not decayed by then, unless `schedule` is constant."""
    min_improvement: Annotated[float, Field(ge=0)] = 0.0
    """The improvement, in nats, below which that interval has to lie, instead of zero."""
    neftune: Annotated[float, Field(ge=0)] = 0.0
    """NEFTune: uniform noise of this strength on the input embeddings in training (the authors take 5 to 15); 0 is none. Every example has
    noise of its own, so that no shared prefix is computed once."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of the adapter's initial values, dropout and noise; and of the validation split and the order of examples, unless `data.seed` is given."""
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
    def _nothing_unread(self) -> Any:
        if self.floor and self.schedule not in ENDS:
            raise ValueError(f"floor: {self.schedule} does not decay to an end. It is read with {', '.join(ENDS)}.")
        if self.decay is not None and self.schedule != "wsd":
            raise ValueError(f"decay: it is read with schedule: wsd alone, and {self.schedule} decays from the warm-up on.")
        if self.schedule == "inverse_sqrt" and not self.warmup:
            raise ValueError(
                "schedule: inverse_sqrt decays in proportion to the length of the warm-up, so warmup must not be 0."
            )
        if self.min_improvement and self.patience is None:
            raise ValueError("min_improvement: it is read with patience alone.")
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
    def shares_prefixes(self) -> bool:
        """Whether tokens that several rows begin with are computed once."""
        return not self.neftune

    @property
    def keeps_frozen_outputs(self) -> bool:
        """Whether frozen layers' outputs are kept for later epochs: how many depends on the free memory, their rounding on the pack."""
        return (self.epochs == "auto" or self.epochs > 1) and not self.deterministic and not self.neftune

    def epochs_and_rows(self, rows: int) -> tuple[float, int | None]:
        """The epochs over so many rows, and the rows of a step; None if steps are measured in tokens."""
        epochs, rows_per_step = EPOCHS[0] if self.epochs == "auto" else self.epochs, self.rows_per_step
        if rows_per_step is None and self.tokens_per_step is None:
            rows_per_step = max(ROWS[0], min(ROWS[1], int(epochs * rows / STEPS)))
        if self.epochs == "auto" and rows_per_step is not None:
            epochs = max(EPOCHS[0], min(EPOCHS[1], float(math.ceil(LEAST_STEPS * rows_per_step / rows))))
        return epochs, rows_per_step
