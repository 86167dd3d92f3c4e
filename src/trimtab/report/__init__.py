"""Telling people what happens."""

from trimtab.report.progress import Terminal
from trimtab.report.watch import Silent, Watcher

__all__ = ["Silent", "Terminal", "Watcher"]
