"""From numbers to places on a drawing: scales with round ticks, and long series thinned without losing their extremes."""

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from trimtab.report.page.words import number

Point = tuple[float, float]
Band = tuple[float, float, float]
"""An x, and the lowest and highest value there."""
MOST_POINTS = 600
"""Of a line that is drawn."""
FRACTION, HUGE = 2**64, 1e200
"""The part of 1 to which means are exact, and the value up to which they are."""
LOGARITHMIC_FROM = 30.0
"""The ratio of the largest to the smallest value from which a linear scale would show only the largest."""


@dataclass(frozen=True)
class Scale:
    """An axis: the range of its values, along a length."""

    low: float
    high: float
    start: float
    """The place of `low`, …"""
    end: float
    """… and of `high`."""
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        value, low, high = (math.log(v) if self.logarithmic else v for v in (value, self.low, self.high))
        return self.start + (self.end - self.start) * min(1.0, max(0.0, (value - low) / (high - low)))

    def ticks(self, most: int) -> list[float]:
        """Round values within the range, at most about so many."""
        if not self.logarithmic:
            return list(_linear_ticks(self.low, self.high, most))
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for digits in ((1, 2, 5), (1, 3), (1,)):
            found = [tick for d in decades for digit in digits if self.low <= (tick := digit * 10.0**d) <= self.high]
            if len(found) <= most:
                return found
        return found[:: -(-len(found) // most)]


def fitting(values: Sequence[float], start: float, end: float, *, logarithmic: bool | None = False) -> Scale:
    """A scale that shows all values; logarithmic where their ratio asks for it, if that is None."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    if logarithmic is None:
        logarithmic = low > 0 and high / low >= LOGARITHMIC_FROM
    if logarithmic and low > 0:
        return Scale(low / 1.15, high * 1.15, start, end, True)
    room = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    return Scale(0.0 if 0 <= low < (high - low) / 2 else low - room, high + room, start, end)


def _linear_ticks(low: float, high: float, most: int) -> Iterator[float]:
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(digit * power for digit in (1, 2, 5, 10) if digit * power >= rough * 0.999)
    for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1):
        yield float(f"{n * step:.12g}")


def tick_text(value: float) -> str:
    if value and not 1e-4 <= abs(value) < 1e6:
        return number(value, 2)
    return f"{value:,.6g}".replace("-", "−")


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most so many of the points: of every stretch, the lowest and the highest; the first and the last."""
    if len(points) <= most:
        return list(points)
    stretches = most // 2 - 1
    kept = {0, len(points) - 1}
    for n in range(stretches):
        stretch = range(n * len(points) // stretches, (n + 1) * len(points) // stretches)
        kept |= {min(stretch, key=lambda i: points[i][1]), max(stretch, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]


def thinned_band(band: Sequence[Band], most: int = MOST_POINTS // 2) -> list[Band]:
    """The same of a band: each stretch as wide as its widest."""
    if len(band) <= most:
        return list(band)
    cuts = [n * len(band) // most for n in range(most + 1)]
    stretches = [band[a:b] for a, b in pairwise(cuts)]
    return [(one[0][0], min(low for _, low, _ in one), max(high for _, _, high in one)) for one in stretches]


def smoothed(points: Sequence[Point], share: float = 0.05) -> list[Point]:
    """Means of so large a share of the points around each of them; at the ends, of those that are there."""
    whole = (int(min(max(y, -HUGE), HUGE) * FRACTION) for _, y in points)  # exact: one huge value would round away all after it
    sums = list(accumulate(whole, initial=0))
    reach, found = int(len(points) * share / 2), []
    for n, (x, _) in enumerate(points):
        first, after = max(0, n - reach), min(len(points), n + reach + 1)
        found.append((x, (sums[after] - sums[first]) / ((after - first) * FRACTION)))
    return found


def spread(xs: Sequence[float], always: Sequence[float], most: int) -> list[float]:
    """At most about so many of the sorted xs, evenly, with those that are always shown."""
    chosen = set(always[:: -(-len(always) // most)]) if always else set()
    left = max(2, most - len(chosen))
    if len(xs) <= left:
        return sorted(chosen | set(xs))
    return sorted(chosen | {xs[n * (len(xs) - 1) // (left - 1)] for n in range(left)})


def value_at(points: Sequence[Point], x: float) -> float | None:
    """The value of a series at exactly this x, if it has one."""
    place = bisect_left(points, (x, -math.inf))
    return points[place][1] if place < len(points) and points[place][0] == x else None
