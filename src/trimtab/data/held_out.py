"""Which training examples are held out for validation: a fraction or a count, of each named source its part."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from trimtab.core.errors import DataError
from trimtab.data.example import TokenRow
from trimtab.data.order import apportion, split


def places_held_out(wanted: Any, rows: Iterable[TokenRow], seed: int) -> set[str]:
    """The places of validation examples. An example that several sources have is held out in all of them.

    Args:
        wanted: A fraction below 1, or a count.

    Raises:
        DataError: None would be left of a source to train on.
    """
    sources: dict[str, Counter[str]] = {}  # source -> the places in it, in order, and how many rows each has
    for row in rows:
        sources.setdefault(row.source, Counter())[row.where] += 1
    if not wanted:
        return set()
    sizes = {name: len(places) for name, places in sources.items()}
    counts = held_out_counts(wanted, sizes, {name: next(iter(of.values())) > 1 for name, of in sources.items()})
    chosen: set[str] = set()
    for name, count in counts.items():
        places = list(sources[name])
        chosen.update(places[n] for n in split(len(places), count, f"{seed}/{name}" if name else seed)[1])
    return chosen


def held_out_counts(wanted: Any, sizes: dict[str, int], divided: Mapping[str, bool] | None = None) -> dict[str, int]:
    """How many examples of each source are held out: at least one of each, if so many are wanted.

    Args:
        wanted: A fraction below 1, or a count.
        sizes: How many there are.
        divided: Of a source, whether its first example is a text that was split.

    Raises:
        DataError: None would be left of a source to train on.
    """
    counts = _counts(wanted, sizes) if wanted else dict.fromkeys(sizes, 0)
    for name, count in counts.items():
        if count >= sizes[name]:
            of_source = f" of {name}" if name else ""
            more = " (A text is one example, however long.)" if count == 1 and (divided or {}).get(name) else ""
            raise DataError(
                f"data.eval: {wanted:g} would hold out {count} of {sizes[name]} usable examples{of_source} and leave none to train on."
                f"{more} Give a smaller fraction or count, a file of its own, or 0."
            )
    return counts


def _counts(wanted: float, sizes: dict[str, int]) -> dict[str, int]:
    if wanted < 1:
        return {name: max(1, round(wanted * size)) for name, size in sizes.items()}
    counts = apportion(round(wanted), sizes)
    if wanted >= len(counts):
        for name in [name for name, count in counts.items() if not count]:
            counts[max(counts, key=lambda other: counts[other])] -= 1
            counts[name] = 1
    return counts
