"""Telling people what happens."""

from trimtab.report.events import RunObserver, Silent
from trimtab.report.progress import Answering, Terminal

__all__ = ["Answering", "RunObserver", "Silent", "Terminal"]
