"""How evenly the packs of a step are divided among processes: predicted from the lengths of its examples."""

import random
from collections.abc import Callable, Sequence
from math import ceil
from typing import NamedTuple

from trimtab.core.processes import Processes
from trimtab.data.bin_packing import Group, first_fit_decreasing
from trimtab.data.pack import FEW

Cost = Callable[[int], float]
"""Of an example of so many tokens, in any unit."""


class Shares(NamedTuple):
    """Of one step, or means over several."""

    busy: float
    """The mean process's work as a share of the busiest one's: the share of the time in which processes compute."""
    packs: float
    empty: float
    """Processes without a pack."""


def made_up_lengths(rows: int, seed: int) -> list[int]:
    """Tokens of short instructions and answers, as in Alpaca: lognormal, median 134, mean 177, from 12 to 2,048."""
    draw = random.Random(seed)
    return [max(12, min(2048, int(draw.lognormvariate(4.9, 0.75)))) for _ in range(rows)]


def packs_of(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Lengths divided into packs as `trimtab.data.pack_all` divides rows that share nothing: filled again evenly if there are a few."""
    groups = [Group([number], length, 0) for number, length in enumerate(lengths)]
    bins = first_fit_decreasing(groups, tokens)
    least = sum(full.tokens for full in bins) // max(1, len(bins))
    if 1 < len(bins) <= FEW and least < tokens:
        evener = (first_fit_decreasing(groups, least + (tokens - least) * part // 8) for part in range(8))
        bins = next((even for even in evener if len(even) <= len(bins)), bins)
    return [[lengths[number] for number in full.numbers] for full in bins]


def share_out(costs: Sequence[float], processes: int) -> list[float]:
    """The work of each process, as `trimtab train` divides packs of these costs."""
    return [sum(costs[task] for task in own) for own in Processes(0, processes).share(costs)]


def pack_size(lengths: Sequence[int], processes: int, most: int, parts: int, room: float) -> int:
    """Tokens of a pack by which each process has at least so many packs, all of one size, as far as the longest example allows.

    Args:
        most: Tokens of a pack that fit.
        parts: Packs a process; more if they would not fit.
        room: By how much a pack may be larger, as a share: packs that are not quite full would leave a last, small one.
    """
    share = (1 + room) * sum(lengths) / processes
    return max(*lengths, min(most, ceil(share / max(parts, ceil(share / most)))))


def shares_of(lengths: Sequence[int], processes: int, tokens: int, cost: Cost) -> Shares:
    """Of one step, in packs of at most so many tokens."""
    packs = packs_of(lengths, tokens)
    work = share_out([sum(map(cost, pack)) for pack in packs], processes)
    return Shares(sum(work) / processes / max(work), len(packs), work.count(0.0))


def mean_shares(steps: Sequence[Sequence[int]], processes: int, size: Callable[[Sequence[int]], int], cost: Cost) -> Shares:
    """Means over steps, given as the lengths of their examples; `size` says how many tokens a step's packs have at most."""
    found = [shares_of(lengths, processes, size(lengths), cost) for lengths in steps]
    return Shares(*(sum(values) / len(found) for values in zip(*found, strict=True)))
