"""Training objectives, one file each."""

from trimtab.objectives._base import KL, Objective, ReferenceObjective
from trimtab.objectives._kl_estimate import KLEstimate, mean_measures, score_packs

__all__ = ["KL", "KLEstimate", "Objective", "ReferenceObjective", "mean_measures", "score_packs"]
