"""Training objectives, one file each."""

from trimtab.objectives._base import Objective
from trimtab.objectives._comparing import Comparing
from trimtab.objectives._pooling import averaged, learned_and_pooled

__all__ = ["Comparing", "Objective", "averaged", "learned_and_pooled"]
