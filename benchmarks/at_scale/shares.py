"""How evenly the packs of a step are divided among processes: predicted from the lengths of its examples."""

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from trimtab.core.processes import Processes
from trimtab.data.bin_packing import Group, divisible_bins, first_fit_decreasing

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


def packs_of(lengths: Sequence[int], tokens: int, processes: int = 1) -> list[list[int]]:
    """Lengths divided into packs as `trimtab.data.pack_all` divides rows that share nothing."""
    groups = [Group([number], length, 0) for number, length in enumerate(lengths)]
    bins = divisible_bins(groups, tokens, processes) if processes > 1 else first_fit_decreasing(groups, tokens)
    return [[lengths[number] for number in full.numbers] for full in bins]


def share_out(costs: Sequence[float], processes: int) -> list[float]:
    """The work of each process, as `trimtab train` divides packs of these costs."""
    return [sum(costs[task] for task in own) for own in Processes(0, processes).share(costs)]


def shares_of(lengths: Sequence[int], processes: int, tokens: int, cost: Cost, *, even: bool = True) -> Shares:
    """Of one step, in packs of at most so many tokens.

    Args:
        even: Whether packs are made for the processes to divide.
    """
    packs = packs_of(lengths, tokens, processes if even else 1)
    work = share_out([sum(map(cost, pack)) for pack in packs], processes)
    return Shares(sum(work) / processes / max(work), len(packs), work.count(0.0))


def mean_shares(steps: Sequence[Sequence[int]], processes: int, tokens: int, cost: Cost, *, even: bool = True) -> Shares:
    """Of several steps, given as the lengths of their examples, one after another."""
    found = [shares_of(lengths, processes, tokens, cost, even=even) for lengths in steps]
    work = [sum(map(cost, lengths)) for lengths in steps]
    busiest = sum(of_step / one.busy for of_step, one in zip(work, found, strict=True))
    return Shares(sum(work) / busiest, *(sum(values) / len(found) for values in list(zip(*found, strict=True))[1:]))
