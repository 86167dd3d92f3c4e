"""Experiment trackers, one file each: they receive what metrics.jsonl gets, under the names that people expect there."""

from trimtab.track._base import Tracker

__all__ = ["Tracker"]
