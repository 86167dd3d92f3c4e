"""Telling people what happens."""

from trimtab.report.events import Silent, Watcher
from trimtab.report.progress import Answering, Terminal

__all__ = ["Answering", "Silent", "Terminal", "Watcher"]
