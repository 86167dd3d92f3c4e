"""The report of a run, written again whenever there is something new. It never stops the run."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trimtab.artifacts.run_folder import REPORT
from trimtab.core import files
from trimtab.report import RunObserver
from trimtab.report.page.run_report import run_report

SHARE = 0.01
"""Of the time of a run: what its pages may take before its end."""
QUICK = 0.2
"""Seconds up to which a page may be written at every evaluation, which takes longer."""


class ReportPage(RunObserver):
    """Writes `report.html` at the first step, at every evaluation, at the end, and when there is a certificate.

    The page of a long run reads more lines each time: evaluations are passed over that would make all pages cost more than `SHARE`.
    """

    def __init__(self, folder: Path, on_notice: Callable[[str], None]) -> None:
        self.folder, self._tell, self._began = folder, on_notice, time.perf_counter()
        self.seconds: list[float] = []
        """How long each writing took."""
        self._failed = False

    def logged(self, kind: str, step: int, values: dict[str, Any]) -> None:
        if not self.seconds or (kind != "train" and self._affordable()):
            self.write()

    def _affordable(self) -> bool:
        last, spent = self.seconds[-1], sum(self.seconds)
        return last <= QUICK or spent + last <= SHARE * (time.perf_counter() - self._began)

    def on_finish(self, record: dict[str, Any], folder: Path) -> None:
        self.write()

    def on_certificate(self, certificate: dict[str, Any]) -> None:
        self.write()

    def on_failure(self, error: BaseException) -> None:
        self.write()

    def write(self) -> None:
        """Write the page; what goes wrong is told once."""
        began = time.perf_counter()
        try:
            files.write_text(self.folder / REPORT, run_report(self.folder))
        except Exception as error:
            if not self._failed:
                self._tell(f"{REPORT} could not be written: {error}. `trimtab report {self.folder}` writes it later.")
            self._failed = True
        self.seconds.append(time.perf_counter() - began)
