"""What each named source contributes to an epoch."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trimtab.core.errors import DataError
from trimtab.data.example import TokenRow, row_groups
from trimtab.data.order import apportion


@dataclass(frozen=True)
class Share:
    """A source's part of an epoch."""

    examples: int
    """How many training examples it has."""
    per_epoch: int
    """How many of an epoch's examples are its own."""
    share: float
    """The same, divided by all of them."""
    held_out: int
    """How many validation examples it has."""

    @property
    def times(self) -> float:
        """How often each of its examples is trained on in an epoch, on average."""
        return self.per_epoch / self.examples

    def __str__(self) -> str:
        often = "" if self.per_epoch == self.examples else f", each of its {self.examples:,} {self.times:.3g} times"
        held_out = f"; {self.held_out:,} for validation" if self.held_out else ""
        return f"{self.share:.0%} of each epoch: {self.per_epoch:,} examples{often}{held_out}"

    def plain(self) -> dict[str, Any]:
        """As JSON data."""
        return asdict(self)


def shares(rows: Sequence[TokenRow], held_out: Sequence[TokenRow], weights: Mapping[str, float]) -> dict[str, Share]:
    """The share of each named training source; none where sources have no names.

    Raises:
        DataError: A source's weight is so small that no example of it would be trained on.
    """
    sizes, validation = _sizes(rows), _sizes(held_out)
    parts = apportion(sizes.total(), weights) if weights else sizes
    refuse_nothing(parts)
    return {
        name: Share(size, parts[name], parts[name] / sizes.total(), validation[name]) for name, size in sizes.items() if name
    }


def refuse_nothing(per_epoch: Mapping[str, int]) -> None:
    """Raise DataError for a source that contributes no example to an epoch."""
    for name, part in per_epoch.items():
        if part == 0:
            raise DataError(
                f"data.train.{name}.weight: its share of an epoch of {sum(per_epoch.values()):,} examples is less than one. "
                "Raise it, or leave the source out."
            )


def _sizes(rows: Sequence[TokenRow]) -> Counter[str]:
    """How many examples each source has."""
    return Counter(rows[group[0]].source for group in row_groups(rows))
