"""Training objectives, one file each."""

from trimtab.objectives.base import Objective

__all__ = ["Objective"]
