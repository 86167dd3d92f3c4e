"""The trackers of a run, while it runs: their processes are started, looked at after each line of its metrics, and ended with it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from trimtab.artifacts.run_folder import TRACKERS
from trimtab.report import RunObserver
from trimtab.run.recipe import Recipe
from trimtab.track import LIMIT, TrackerProcess


class Tracking(RunObserver):
    """Tells an observer of each tracker that fails, once."""

    def __init__(self, processes: list[TrackerProcess], observer: RunObserver) -> None:
        self.processes, self.observer = processes, observer

    def logged(self, kind: str, step: int, values: dict[str, Any]) -> None:
        for process in self.processes:
            self._notice(process.failure())

    def on_finish(self, record: dict[str, Any], folder: Path) -> None:
        for process in self.processes:
            process.finish("done")  # and goes on while the adapter is certified

    def end(self, status: str) -> None:
        """Let all finish, together within one limit; a further Ctrl-C ends them at once."""
        for process in self.processes:
            process.finish(status)
        try:
            since = time.monotonic()
            for process in self.processes:
                self._notice(process.wait(LIMIT, since))
        except KeyboardInterrupt:
            for process in self.processes:
                process.end()

    def _notice(self, problem: str | None) -> None:
        if problem is not None:
            self.observer.on_notice(problem)


@contextmanager
def tracked(recipe: Recipe, folder: Path, observer: RunObserver) -> Iterator[Tracking]:
    """The trackers of a run that begins, until it ends, as an observer of it.

    Args:
        observer: Is told where each tracker's numbers go, and of its failure.
    """
    processes = [TrackerProcess(tracker, folder) for tracker in recipe.track]
    tracking, status = Tracking(processes, observer), "failed"
    try:
        for process in processes:
            observer.on_tracker(process.tracker.name, process.tracker.place(folder / TRACKERS / process.tracker.name))
            process.start()
        yield tracking
        status = "done"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        with suppress(KeyboardInterrupt):  # the first is the one to report
            tracking.end(status)
