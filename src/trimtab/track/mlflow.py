"""MLflow."""

import os
import re
import time
from pathlib import Path
from typing import Any, ClassVar

from pydantic import field_validator

from trimtab.track._base import Opening, Session, Text, Tracker, without_password
from trimtab.track._names import COLUMNS, Line

TAG = "trimtab.run"
"""By which a run is found again: MLflow makes ids itself."""
NO_NAME = re.compile(r"[^\w.: -]")
"""Characters that MLflow refuses in a parameter's name, as patterns of modules (`method.ranks`) have them."""
MOST_NUMBERS = 1000
"""That a server takes at once."""


class MLflow(Tracker):
    """MLflow: on the server that MLFLOW_TRACKING_URI or `uri` names, else in a database file."""

    package: ClassVar[str] = "mlflow"
    uri: Text | None = None
    """The tracking server or database; that of MLFLOW_TRACKING_URI unless given, or a file in the run's folder."""

    @field_validator("uri")
    @classmethod
    def _without_password(cls, uri: str | None) -> str | None:
        if uri is not None and without_password(uri) != uri:
            raise ValueError(
                "a recipe is kept, shown and shared: leave the password out, and set MLFLOW_TRACKING_URI, or MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD."
            )
        return uri

    def address(self, folder: Path) -> str:
        return self.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.absolute()}/mlflow.db"

    def place(self, folder: Path) -> str:
        address = self.address(folder)
        own = address.endswith("/mlflow.db") and str(folder.absolute()) in address
        shown = f"; `mlflow ui --backend-store-uri {address}` shows it" if own else ""
        return f"experiment {self.project} in {without_password(address)}{shown}"

    def environment(self, folder: Path) -> dict[str, str | None]:
        return {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_RUN_ID": None, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}

    def open(self, opening: Opening) -> "MLflowRun":
        return MLflowRun(opening, self)


class MLflowRun(Session):
    """The run there, found by its tag; steps that it has are not sent again, as MLflow would hold them twice."""

    def __init__(self, opening: Opening, tracker: MLflow) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self.client = MlflowClient(tracker.address(opening.folder))
        experiment = self.client.get_experiment_by_name(tracker.project)
        if experiment is None:
            kept = f"file://{opening.folder.absolute()}/artifacts" if "sqlite" in tracker.address(opening.folder) else None
            identifier = self.client.create_experiment(tracker.project, kept)
        else:
            identifier = experiment.experiment_id
        found = self.client.search_runs([identifier], f"tags.`{TAG}` = '{opening.id}'")
        if found:
            self.id = found[0].info.run_id
            self.client.update_run(self.id, status="RUNNING")
        else:
            self.id = self.client.create_run(identifier, run_name=opening.name, tags={TAG: opening.id}).info.run_id
        known = self.client.get_run(self.id).data.params  # MLflow refuses another value for one of them
        missing = [Param(name, value[:6000]) for name, value in _flat(opening.config).items() if name not in known]
        for start in range(0, len(missing), 100):  # as many as a server takes at once
            self.client.log_batch(self.id, params=missing[start : start + 100])
        self.waiting: list[Line] = []
        self.held: dict[str, int] = {}

    def has(self, line: Line) -> bool:
        if line.kind not in self.held:
            known = (metric.step for name in line.values for metric in self.client.get_metric_history(self.id, name))
            self.held[line.kind] = max(known, default=-1)
        return line.step <= self.held[line.kind]

    def log(self, line: Line) -> None:
        self.waiting.append(line)

    def flush(self) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        lines, self.waiting = self.waiting, []
        batches: list[list[Any]] = [[]]
        for line in lines:  # whole, so that the last step says what is there
            numbers = [Metric(name, value, now, line.step) for name, value in line.values.items()]
            if len(batches[-1]) + len(numbers) > MOST_NUMBERS:
                batches.append([])
            batches[-1] += numbers
        for batch in batches:
            for start in range(0, len(batch), MOST_NUMBERS):
                self.client.log_batch(self.id, batch[start : start + MOST_NUMBERS])
        for line in lines:
            if line.rows:
                columns = dict(
                    zip(("step", *COLUMNS), zip(*([line.step, *row] for row in line.rows), strict=True), strict=True)
                )
                self.client.log_table(
                    self.id, {key: list(map(str, cells)) for key, cells in columns.items()}, "eval_samples.json"
                )

    def close(self, done: bool) -> None:
        self.flush()
        self.client.set_terminated(self.id, "FINISHED" if done else "KILLED")


def _flat(config: dict[str, object], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        found |= _flat(value, f"{name}.") if isinstance(value, dict) else {NO_NAME.sub("_", name)[:250]: str(value)}
    return found
