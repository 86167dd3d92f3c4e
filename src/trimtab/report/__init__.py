"""Telling people what happens."""

from trimtab.report.progress import Answering, Terminal
from trimtab.report.watch import Silent, Watcher

__all__ = ["Answering", "Silent", "Terminal", "Watcher"]
