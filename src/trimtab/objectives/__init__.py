"""Training objectives, one file each."""

from trimtab.objectives._base import Objective
from trimtab.objectives._comparing import Comparing
from trimtab.objectives._kl_estimate import KLEstimate, mean_measures, score_packs

__all__ = ["Comparing", "KLEstimate", "Objective", "mean_measures", "score_packs"]
