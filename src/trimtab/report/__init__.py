"""What a run, an evaluation and a folder look like to people: on the terminal, and as pages."""

from trimtab.report.events import RunObserver, Together
from trimtab.report.progress import AnsweringBar, Terminal

__all__ = ["AnsweringBar", "RunObserver", "Terminal", "Together"]
