"""The process of a tracker, as training sees it: it is started, asked without waiting whether it has failed, and ended."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from trimtab.core.process import environment_alone, module_command
from trimtab.track._base import Tracker

LIMIT = 10.0
"""Seconds that a tracker has to finish in, once training has ended."""
GRACE = 1.0
"""Seconds that the system has to end it in."""
PATIENCE = 120.0
"""Seconds after which a call of its package is taken to hang. A slow network is given up sooner by all of them."""


class TrackerProcess:
    """Sends a run's metrics.jsonl to a tracker, in a process of its own, and goes on until it is told that the run has ended.

    It is a process rather than a thread because the packages of trackers replace what a process has once: its output, its hooks
    for signals, exceptions and exits. And it can be ended, whatever it does; if training is killed instead, it notices and finishes.
    """

    def __init__(self, tracker: Tracker, folder: Path, patience: float = PATIENCE) -> None:
        """
        Args:
            folder: The run's.
        """
        self.tracker, self.folder, self.patience = tracker, folder, patience
        self.lines = 0
        """How many lines it has sent, once it has finished."""
        self._process: subprocess.Popen[bytes] | None = None
        self._unread, self._ended, self._told = b"", False, False

    def start(self) -> None:
        """Never raises: that no process can be started is its first failure."""
        from trimtab.artifacts.run_folder import METRICS, RECIPE, RUN, TRACKERS  # with torch, which the process does without

        folder, own = self.folder.absolute(), self.folder.absolute() / TRACKERS / self.tracker.name
        changes = self.tracker.environment(own)
        variables = {**environment_alone(), **{key: value for key, value in changes.items() if value is not None}}
        variables = {key: value for key, value in variables.items() if changes.get(key, "") is not None}
        job = {"tracker": self.tracker.plain(), "folder": str(own), "name": folder.name, "patience": self.patience}
        job |= {name: str(folder / file) for name, file in (("record", RUN), ("recipe", RECIPE), ("metrics", METRICS))}
        with suppress(OSError):
            self._process = subprocess.Popen(
                module_command("trimtab.track._worker"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=variables,
                start_new_session=True,  # Ctrl-C in a terminal is for training alone
            )
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            os.set_blocking(self._process.stdout.fileno(), False)
            self._tell(json.dumps(job))

    def failure(self) -> str | None:
        """What the user should know of its failure, once; None while there is none. Does not wait."""
        if self._ended:
            return None
        gone = self._process is None or self._process.poll() is not None  # asked first: its last word is there by then
        for said in self._said():
            if "failed" in said:
                return self._off(said["failed"])
            self.lines, self._ended = said["lines"], True
        if gone and not self._ended:
            return self._off("its process has ended, or could not be started")
        return None

    def finish(self, status: str) -> None:
        """Tell it that the run has ended, and how: `done`, `interrupted` or `failed`. Does not wait."""
        if not self._told and not self._ended and self._process is not None:
            self._told = True
            self._tell(status)

    def wait(self, limit: float = LIMIT, since: float | None = None) -> str | None:
        """Wait until it has finished, or end it after so many seconds; what the user should know of that, if anything.

        Args:
            since: When they began, by `time.monotonic`: now unless given.
        """
        started, problem = time.monotonic() if since is None else since, None
        try:
            while (problem := self.failure()) is None and not self._ended:
                if time.monotonic() - started > limit:
                    return self._off(f"it has not finished within {limit:g} s")
                time.sleep(0.02)
            return problem
        finally:
            self.end()

    def end(self) -> None:
        """End it, and whatever it has started, at once."""
        self._ended = True
        if self._process is None:
            return
        with suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # one that a dead network file system holds does not end
            self._process.wait(GRACE)
        for stream in (self._process.stdin, self._process.stdout):
            with suppress(OSError):
                stream.close()  # type: ignore[union-attr]

    def _off(self, what: str) -> str:
        self.end()
        again = f"trimtab track {self.folder} --to {self.tracker.name}"
        return (
            f"track: {self.tracker.name}: {what}. It is off now, and nothing is lost: once training has ended, `{again}` sends all of the "
            "run's metrics.jsonl"
        )

    def _tell(self, text: str) -> None:
        with suppress(OSError):  # it has ended, which the next look at it finds
            assert self._process is not None
            self._process.stdin.write(text.encode() + b"\n")  # type: ignore[union-attr]
            self._process.stdin.flush()  # type: ignore[union-attr]

    def _said(self) -> Iterator[dict[str, Any]]:
        """What it has said since the last look."""
        if self._process is None:
            return
        with suppress(OSError):
            while part := os.read(self._process.stdout.fileno(), 65536):  # type: ignore[union-attr]
                self._unread += part
        *lines, self._unread = self._unread.split(b"\n")
        for line in lines:
            with suppress(ValueError):  # what an interpreter's own start-up files print is none of its words
                said = json.loads(line)
                if isinstance(said, dict):
                    yield said
