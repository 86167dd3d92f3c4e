"""Training objectives, one file each."""

from trimtab.objectives._base import Objective
from trimtab.objectives._comparing import Comparing
from trimtab.objectives._kl_estimate import Pool, answered, averaged

__all__ = ["Comparing", "Objective", "Pool", "answered", "averaged"]
