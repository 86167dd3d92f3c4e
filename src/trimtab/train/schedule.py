"""The learning rate at each step: a pure function, so nothing has to be remembered to resume."""

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

Schedule = Literal["cosine", "linear", "constant", "wsd", "inverse_sqrt"]
ENDS: tuple[Schedule, ...] = ("cosine", "linear", "wsd")
"""The schedules that reach their end, zero or the floor, at the end of the run."""
DECAY = 0.2
"""The part of a run over which wsd decays, unless given."""


def _share(raw: Any) -> Any:
    """Refuse what could mean both a fraction and a number of steps."""
    if isinstance(raw, int | float) and (raw < 0 or (isinstance(raw, float) and raw >= 1)):
        advice = f" (write {int(raw)} for {'one step' if raw == 1 else 'so many steps'})" if raw >= 1 and raw % 1 == 0 else ""
        raise ValueError(f"expected a fraction of the steps (below 1) or a whole number of them, got {raw}{advice}.")
    return raw


Share = Annotated[Annotated[float, Field(ge=0, lt=1)] | Annotated[int, Field(ge=1)], BeforeValidator(_share)]
"""A part of a run: a fraction of its steps, or a number of them."""


def learning_rate(
    step: int, steps: int, peak: float, warmup: float, schedule: Schedule, floor: float = 0.0, decay: float | None = None
) -> float:
    """The learning rate of optimizer step `step` (1-based) of `steps`.

    It reaches the peak at the last step of the warm-up and has it at the next one, where the decay begins. Transformers' schedules are
    a step behind in the warm-up, because their first step has the rate zero and changes nothing; in the decay they are the same.
    """
    rising = share_of(warmup, steps)
    if step <= rising:
        return peak * step / rising
    if schedule == "constant":
        return peak
    if schedule == "inverse_sqrt":  # it has a warm-up, if only of a step that rounding has left out
        return peak * math.sqrt(max(1, rising) / max(1, step - 1))
    falling = steps - rising
    if schedule == "wsd":
        falling = min(falling, max(1, share_of(DECAY if decay is None else decay, steps)))
    left = min(1.0, (steps - step + 1) / falling)  # 1 at the first step of the decay, 1 / falling at the last
    return peak * (floor + (1 - floor) * (left if schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left))))


def share_of(share: float, steps: int) -> int:
    """A part of a run in steps."""
    return share if isinstance(share, int) and share >= 1 else round(share * steps)


def misfit(steps: int, warmup: float, schedule: Schedule, decay: float | None) -> str | None:
    """Why a run of so many steps has no room for its warm-up and decay, or None."""
    late = 0.0 if schedule != "wsd" else DECAY if decay is None else decay
    for key, share in (("warmup", warmup), ("decay", late)):
        if isinstance(share, int) and share > steps:
            return (
                f"train.{key}: {share:,} steps are more than the {steps:,} of the run. Give fewer, or a fraction, such as 0.05."
            )
    rising, falling = (share if isinstance(share, int) else share * steps for share in (warmup, late))
    if rising + falling > steps + 1e-6:
        return (
            f"train.warmup and train.decay: {rising:g} and {falling:g} steps are more than the {steps:,} of the run together."
        )
    return None
