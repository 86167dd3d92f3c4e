"""The process of one tracker: python -m trimtab.track._worker, with a job, and later the run's status, as lines on standard input.

It reads the run's metrics.jsonl while it grows and sends each line on. Its standard output holds one line of JSON: that it has failed, or
has finished. Whatever the tracker's package prints goes nowhere.
"""

import hashlib
import json
import os
import select
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from trimtab.core import files, yaml12
from trimtab.track._base import Opening, Session, Tracker, without_password
from trimtab.track._names import Line, Namer

INTERVAL = 0.5
"""Seconds between looks at metrics.jsonl."""
AT_ONCE = 200
"""Lines that are sent before the tracker's package has to answer: of a run that has ended, all are there at once."""
FACTS = (
    "steps",
    "epochs",
    "rows_per_step",
    "peak_lr",
    "trainable_parameters",
    "base_parameters",
    "learned_tokens",
    "device",
    "versions",
)
"""Of run.json, what people compare runs by."""


class Worker:
    """Sends the lines of a run's metrics.jsonl to a session."""

    def __init__(self, job: dict[str, Any], watch: "Watch") -> None:
        """
        Args:
            job: `tracker`, its settings; `folder`, for its files; the run's `name`; and paths of its `record`, `recipe` and `metrics`.
        """
        self.tracker: Tracker = Tracker.pick(job["tracker"])
        self.folder, self.name = Path(job["folder"]), job["name"]
        self.record, self.recipe, self.metrics = (Path(job[key]) for key in ("record", "recipe", "metrics"))
        self.watch = watch
        self.namer, self.read, self.unread, self.sent = Namer(), 0, b"", 0
        self.last: Line | None = None
        self.session: Session

    def open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        record = files.read_json(self.record)
        recipe = yaml12.load_file(self.recipe)
        settings = {key: value for key, value in recipe.items() if key not in ("track", "resume")}
        config = {**_without_home(settings), "run": {key: record[key] for key in FACTS if record.get(key) is not None}}
        identity = record.get("id") or hashlib.sha256(str(record.get("moment")).encode()).hexdigest()[:21]
        with self.watch.call("start"):
            self.session = self.tracker.open(Opening(self.folder, identity, self.tracker.run or self.name, config))

    def send_new(self) -> None:
        """Send what metrics.jsonl has got since the last look."""
        if not self.metrics.exists() or self.metrics.stat().st_size == self.read:
            return
        with open(self.metrics, "rb") as file:
            file.seek(self.read)
            part = file.read()
        self.read += len(part)
        *lines, self.unread = (self.unread + part).split(b"\n")
        named = list(filter(None, map(self.namer.line, lines)))
        for start in range(0, len(named), AT_ONCE):
            for line in named[start : start + AT_ONCE]:
                with self.watch.call("log"):
                    if not self.session.has(line):
                        self.session.log(line)
                self.sent, self.last = self.sent + 1, line
            with self.watch.call("log"):
                self.session.flush()

    def close(self, status: str) -> None:
        self.send_new()
        held = (files.read_json(self.record).get("memory_held") or {}).get("measured")
        with self.watch.call("finish"):
            if held and self.last is not None:
                end = Line(self.last.number + 1, "end", self.last.step, {"perf/memory_gb": held / 1e9}, [])
                if not self.session.has(end):
                    self.session.log(end)
            self.session.close(status == "done")


def _without_home(value: Any) -> Any:
    """The recipe with `~` for the user's home folder, whose path can say who that is: others may read what a tracker shows."""
    if isinstance(value, dict):
        return {key: _without_home(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_home(item) for item in value]
    home = str(files.expand_user("~"))
    within = isinstance(value, str) and len(home) > 1 and f"{value}/".startswith(f"{home}/")
    return f"~{value[len(home) :]}" if within else value


class Watch:
    """Ends the process if a call of the tracker's package hangs."""

    def __init__(self, patience: float, channel: int) -> None:
        self.patience, self.channel, self.doing, self.since = patience, channel, "", 0.0
        threading.Thread(target=self._look, daemon=True).start()

    def call(self, doing: str) -> "Watch":
        self.doing = doing
        return self

    def __enter__(self) -> None:
        self.since = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.since = 0.0

    def _look(self) -> None:
        while True:
            time.sleep(min(1.0, self.patience / 4))
            since = self.since
            if since and time.monotonic() - since > self.patience:
                leave(self.channel, {"failed": f"it has not answered to `{self.doing}` for {self.patience:g} s"})


def leave(channel: int, said: dict[str, Any]) -> NoReturn:
    """Say a last word, and end at once, with all that the package has started: what it has registered for the end of a process could
    hang, or speak; and if training was killed, nobody else ends them."""
    with suppress(OSError):
        os.write(channel, json.dumps(said).encode() + b"\n")
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(0)


def problem(error: BaseException) -> str:
    """An error in a line."""
    text = without_password(" ".join(str(error).split())) or "no message"
    return f"{type(error).__name__}: {text if len(text) <= 300 else f'{text[:300]}…'}".rstrip(".")


def silenced() -> tuple[int, int]:
    """Descriptors of the input and output that this process has; from here on, standard input is empty, and output goes nowhere."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    own = os.dup(0), os.dup(1)
    for number in range(3):
        os.dup2(nowhere, number)
    return own


def main() -> NoReturn:
    orders, channel = silenced()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(OSError):
        os.nice(10)  # training comes first
    source = os.fdopen(orders, "rb", buffering=0)
    job = json.loads(source.readline())
    watch = Watch(job["patience"], channel)
    try:
        worker = Worker(job, watch)
        worker.open()
        while not select.select([source], [], [], INTERVAL)[0]:
            worker.send_new()
        worker.close(source.readline().decode().strip())  # nothing, if training was killed
    except BaseException as error:
        leave(channel, {"failed": problem(error)})
    leave(channel, {"lines": worker.sent})


if __name__ == "__main__":
    main()
