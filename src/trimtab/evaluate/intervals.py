"""How sure a measured value is: 95 % intervals, and whether two models on the same examples can be told apart.

A share has Wilson's interval (1927); every other value, those of a whole corpus included, a percentile bootstrap over examples.
Two models are compared by pairs: the difference is bootstrapped over examples, and tested by approximate randomization (Noreen
1989; Riezler & Maxwell 2005), which exchanges the models' answers to examples at random, and needs no distribution.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

Interval = tuple[float, float]
Z = 1.959963984540054
"""The 97.5th percentile of the normal distribution."""
DRAWS = 1000
LEVEL = 0.05
"""Below this probability of a difference by chance, two models are called distinguishable."""


@dataclass(frozen=True)
class Measured:
    """What a metric counts in each example, and the values that follow from the sums over examples."""

    counts: np.ndarray
    """A row an example."""
    values: Callable[[np.ndarray], dict[str, float]]
    """Of the sums of the columns, the values by name."""
    each: dict[str, list[float]] = field(default_factory=dict)
    """By name, the value of each example by itself."""
    shares: frozenset[str] = frozenset()
    """Names of values that are shares of the examples."""

    @classmethod
    def means(cls, each: dict[str, list[float]], shares: Sequence[str] = ()) -> "Measured":
        """Means over the examples."""
        columns = [*each.values(), [1.0] * len(next(iter(each.values())))]
        return cls(
            np.array(columns, dtype=np.float64).T,
            lambda sums: {name: float(total / sums[-1]) for name, total in zip(each, sums, strict=False)},
            each,
            frozenset(shares),
        )

    @property
    def total(self) -> dict[str, float]:
        """The values over all examples."""
        return self.values(self.counts.sum(axis=0))

    def intervals(self) -> dict[str, Interval]:
        drawn = [self.values(sums) for sums in _resampled(self.counts)]
        return {
            name: wilson_interval(round(sum(self.each[name])), len(self.counts))
            if name in self.shares
            else _percentiles([values[name] for values in drawn])
            for name in self.total
        }


class Difference(NamedTuple):
    """How far a model's value is from another's on the same examples."""

    value: float
    interval: Interval
    p: float
    """How probable a difference this large is if it does not matter which of the models answers an example."""

    @property
    def distinguishable(self) -> bool:
        return self.p < LEVEL


def differences(ours: Measured, theirs: Measured) -> dict[str, Difference]:
    """Ours minus theirs, by name, of two models on the same examples."""

    def between(ours_sums: np.ndarray, theirs_sums: np.ndarray) -> dict[str, float]:
        other = theirs.values(theirs_sums)
        return {name: value - other[name] for name, value in ours.values(ours_sums).items()}

    observed = between(ours.counts.sum(axis=0), theirs.counts.sum(axis=0))
    drawn = [between(*sums) for sums in zip(_resampled(ours.counts), _resampled(theirs.counts), strict=True)]
    exchanged, more = _exchanged(ours.counts, theirs.counts), dict.fromkeys(observed, 1)
    for sums in exchanged:
        by_chance = between(*sums)
        for name, value in observed.items():
            more[name] += abs(by_chance[name]) >= abs(value) * (1 - 1e-9)
    return {
        name: Difference(value, _percentiles([values[name] for values in drawn]), more[name] / (len(exchanged) + 1))
        for name, value in observed.items()
    }


def wilson_interval(hits: int, of: int) -> Interval:
    """Wilson's 95 % interval of the share `hits` / `of`."""
    share, z2 = hits / of, Z * Z
    middle = share + z2 / (2 * of)
    half = Z * math.sqrt(share * (1 - share) / of + z2 / (4 * of * of))
    return max(0.0, (middle - half) / (1 + z2 / of)), min(1.0, (middle + half) / (1 + z2 / of))


def paired_difference(ours: Sequence[float], theirs: Sequence[float], counts: Sequence[float]) -> tuple[float, Interval]:
    """The mean difference of two losses on the same rows, and its interval, which differences between rows do not widen.

    Args:
        counts: The number of items whose losses each row sums.
    """
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    return sum(differences) / sum(counts), bootstrap(differences, counts)


def bootstrap(sums: Sequence[float], counts: Sequence[float]) -> Interval:
    """The interval of a mean over items, of rows that each sum some of them."""
    return _percentiles([float(total / of) for total, of in _resampled(np.array([sums, counts], dtype=np.float64).T)])


def _resampled(counts: np.ndarray) -> list[np.ndarray]:
    """The sums of the columns over as many rows, drawn with replacement; the same rows for any counts of as many."""
    generator, rows = np.random.RandomState([0]), len(counts)  # draws as random.Random(0).choices, but faster
    return [counts[(generator.random_sample(rows) * rows).astype(np.int64)].sum(axis=0) for _ in range(DRAWS)]


def _exchanged(ours: np.ndarray, theirs: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """The sums of two models' columns where each row is exchanged or not, at random."""
    generator, whole = np.random.RandomState([1]), ours.sum(axis=0) + theirs.sum(axis=0)
    mixed = (np.where(generator.random_sample((len(ours), 1)) < 0.5, ours, theirs).sum(axis=0) for _ in range(DRAWS))
    return [(sums, whole - sums) for sums in mixed]


def _percentiles(values: list[float]) -> Interval:
    values = sorted(values)
    return values[int(0.025 * len(values))], values[int(0.975 * len(values)) - 1]
