"""Training objectives, one file each."""

from trimtab.objectives._base import Objective
from trimtab.objectives._pooling import averaged, learned_and_pooled

__all__ = ["Objective", "averaged", "learned_and_pooled"]
