"""How sure it is that one of several models is better than another: tests of paired differences, adjusted for how many there are."""

from collections.abc import Iterator, Sequence

import numpy as np

LEAST_DRAWS = 10_000
BATCH = 2**22
"""Signs that are in memory at a time."""


def sign_flip_p(differences: Sequence[float], comparisons: int = 1) -> float:
    """How probable a sum of paired differences this far from 0 is, if it does not matter which model is which.

    Each difference then has either sign. All signs are tried where they are few, else a random sample of them.

    Args:
        comparisons: How many p will be adjusted for: the sample is so large that this does not hide a difference.
    """
    values = np.asarray(differences, dtype=np.float64)
    draws = max(LEAST_DRAWS, 100 * comparisons)
    least = abs(float(values.sum())) * (1 - 1e-9)
    if 2 ** min(len(values), 60) <= draws:
        signs = _all_signs(len(values))
        return float((abs(signs @ values) >= least).mean())
    more = sum(int((abs(signs @ values) >= least).sum()) for signs in _drawn_signs(len(values), draws))
    return (more + 1) / (draws + 1)


def holm(ps: Sequence[float]) -> list[float]:
    """The p values adjusted so that all together err with the probability of one (Holm 1979): each in its place."""
    adjusted, highest = [0.0] * len(ps), 0.0
    for rank, place in enumerate(sorted(range(len(ps)), key=lambda n: ps[n])):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[place]))
        adjusted[place] = highest
    return adjusted


def _all_signs(count: int) -> np.ndarray:
    return 1.0 - 2.0 * (np.arange(2**count)[:, None] >> np.arange(count) & 1)


def _drawn_signs(count: int, draws: int) -> Iterator[np.ndarray]:
    generator, left = np.random.RandomState([2]), draws
    while left > 0:
        size = min(left, max(1, BATCH // count))
        drawn = np.frombuffer(generator.bytes(size * -(-count // 8)), np.uint8).reshape(size, -1)
        yield 1.0 - 2.0 * np.unpackbits(drawn, axis=1, count=count)
        left -= size
