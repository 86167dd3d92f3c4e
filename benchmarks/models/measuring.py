"""What a measure is: it asks Trimtab for something, and returns how far that is from the model itself.

A deviation above its tolerance is wrong. A TrimtabError is a refusal, any other exception a crash.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from models.subject import Subject

TOLERANCE, GRADIENT_TOLERANCE, STEP_TOLERANCE = 1e-4, 1e-3, 5e-4
"""Relative, of float32; of gradients, relative to the largest one; of logits, step by step, relative to the largest one."""


class LeftOut(Exception):
    """There is nothing to compare with; the message says why."""


class Measure(NamedTuple):
    """A question about a model."""

    of: Callable[[Subject], float]
    tolerance: float
    trains: bool
    """It is asked only of models that Trimtab agrees to train."""


TAKEN: dict[str, Measure] = {}


def measure(name: str, tolerance: float = TOLERANCE, *, trains: bool = True) -> Callable[[Callable[[Subject], float]], Any]:
    """Keep a function as a measure."""

    def keep(of: Callable[[Subject], float]) -> Callable[[Subject], float]:
        TAKEN[name] = Measure(of, tolerance, trains)
        return of

    return keep
