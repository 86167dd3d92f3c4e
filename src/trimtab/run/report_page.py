"""The report of a run, written again whenever there is something new. It never stops the run."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trimtab.artifacts.run_folder import REPORT
from trimtab.core import files
from trimtab.report import RunObserver
from trimtab.report.page.run_report import run_report


class ReportPage(RunObserver):
    """Writes `report.html` at the first step, at every evaluation, at the end, and when there is a certificate."""

    def __init__(self, folder: Path, on_notice: Callable[[str], None]) -> None:
        self.folder, self._tell = folder, on_notice
        self.seconds: list[float] = []
        """How long each writing took."""
        self._failed = False

    def logged(self, kind: str, step: int, values: dict[str, Any]) -> None:
        if kind != "train" or not self.seconds:
            self.write()

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
