"""Experiment trackers, one file each: they receive what metrics.jsonl gets, under the names that people expect there.

Each has a process of its own, which reads metrics.jsonl while it grows: whatever it does, training does not wait.
"""

from trimtab.track._base import Tracker
from trimtab.track._process import LIMIT, TrackerProcess

__all__ = ["LIMIT", "Tracker", "TrackerProcess"]
