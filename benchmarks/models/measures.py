"""Every measure, in the order in which they are taken."""

from models import files, other_methods, passes, training
from models.measuring import TAKEN, LeftOut, Measure

__all__ = ["MEASURES", "LeftOut", "Measure"]

MEASURES: dict[str, Measure] = {
    name: one
    for module in (passes, training, other_methods, files)
    for name, one in TAKEN.items()
    if one.of.__module__ == module.__name__
}
