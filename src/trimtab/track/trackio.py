"""Trackio."""

import os
from pathlib import Path
from typing import ClassVar

from trimtab.track._base import Opening, Session, Tracker
from trimtab.track._names import COLUMNS, Line


class Trackio(Tracker):
    """Trackio: a database on this machine, which `trackio sync` can upload to a Hugging Face Space."""

    package: ClassVar[str] = "trackio"

    def place(self, folder: Path) -> str:
        shared = os.environ.get("TRACKIO_DIR")
        command = f"trackio show --project {self.project}"
        return f"files in {shared or folder}; `{'' if shared else f'TRACKIO_DIR={folder} '}{command}` shows them"

    def environment(self, folder: Path) -> dict[str, str | None]:
        kept = os.environ.get("TRACKIO_DIR") or str(folder.absolute())
        return {"TRACKIO_DIR": kept, "TRACKIO_SPACE_ID": None, "TRACKIO_SERVER_URL": None, "HF_HUB_OFFLINE": "1"}

    def open(self, opening: Opening) -> "TrackioRun":
        return TrackioRun(opening, self)


class TrackioRun(Session):
    """The run there, made anew from its beginning: Trackio would hold a step twice."""

    def __init__(self, opening: Opening, tracker: Trackio) -> None:
        import trackio

        name = tracker.run or f"{opening.name}-{opening.id[:6]}"  # Trackio knows runs by their names
        try:
            before = [run for run in trackio.Api().runs(tracker.project) if run.name == name]
        except ValueError:  # there is no such project yet
            before = []
        for run in before:
            run.delete()
        self.trackio, self.name, self.project, self.sent = trackio, name, tracker.project, 0
        self.run = trackio.init(
            project=tracker.project, name=name, config=opening.config, embed=False, auto_log_cpu=False, auto_log_gpu=False
        )

    def log(self, line: Line) -> None:
        table = {"eval/samples": self.trackio.Table(columns=list(COLUMNS), data=line.rows)} if line.rows else {}
        self.sent += 1
        self.run.log({**line.values, **table}, step=line.step)

    def close(self, done: bool) -> None:
        """Raises OSError if the run is not there: Trackio meets a full disk silently."""
        self.run.finish()
        if self.sent and not any(run.name == self.name for run in self.trackio.Api().runs(self.project)):
            raise OSError("Trackio has not kept the run. Is the disk full?")
