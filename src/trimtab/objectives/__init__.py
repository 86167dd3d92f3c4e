"""Training objectives, one file each."""

from trimtab.objectives._base import Objective

__all__ = ["Objective"]
