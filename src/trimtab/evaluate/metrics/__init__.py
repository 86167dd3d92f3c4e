"""Metrics of answers, one file each."""

from trimtab.evaluate.metrics._base import Metric, ScoredAnswer

__all__ = ["Metric", "ScoredAnswer"]
