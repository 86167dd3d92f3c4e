"""A stand-in for MLflow: the calls that track/mlflow.py makes, with the real signatures' names. What it holds is kept in a file."""

import json
from pathlib import Path
from types import SimpleNamespace

from stand_in import keep, note

from mlflow.entities import Metric


class MlflowClient:
    def __init__(self, tracking_uri=None):
        self.uri = tracking_uri
        self.path = Path(str(tracking_uri).removeprefix("sqlite:///"))
        self.held = json.loads(self.path.read_text()) if self.path.exists() else {"experiments": {}, "runs": {}}

    def _save(self):
        keep(self.path.parent, self.path.name, json.dumps(self.held))

    def get_experiment_by_name(self, name):
        known = self.held["experiments"].get(name)
        return known and SimpleNamespace(experiment_id=known)

    def create_experiment(self, name, artifact_location=None):
        self.held["experiments"][name] = str(len(self.held["experiments"]) + 1)
        self._save()
        return self.held["experiments"][name]

    def search_runs(self, experiment_ids, filter_string=""):
        identity = filter_string.partition("'")[2].rstrip("'")
        found = [key for key, run in self.held["runs"].items() if run["tag"] == identity]
        return [SimpleNamespace(info=SimpleNamespace(run_id=key)) for key in found]

    def create_run(self, experiment_id, start_time=None, tags=None, run_name=None):
        (project,) = (name for name, known in self.held["experiments"].items() if known == experiment_id)
        note("mlflow", "init", project=project, name=run_name, id=tags["trimtab.run"], dir=self.uri)
        key = f"mlflow-{len(self.held['runs'])}"
        self.held["runs"][key] = {"tag": tags["trimtab.run"], "metrics": [], "params": {}}
        self._save()
        return SimpleNamespace(info=SimpleNamespace(run_id=key))

    def update_run(self, run_id, status=None, name=None):
        note("mlflow", "update", status=status)

    def get_run(self, run_id):
        return SimpleNamespace(data=SimpleNamespace(params=self.held["runs"][run_id]["params"]))

    def get_metric_history(self, run_id, key):
        held = self.held["runs"][run_id]["metrics"]
        return [Metric(name, value, 0, step) for name, value, step in held if name == key]

    def log_batch(self, run_id, metrics=(), params=()):
        for param in params:
            assert param.key not in self.held["runs"][run_id]["params"]
            self.held["runs"][run_id]["params"][param.key] = param.value
            note("mlflow", "param", key=param.key, value=param.value)
        if metrics:
            note("mlflow", "batch", size=len(metrics))
        by_step = {}
        for metric in metrics:
            assert isinstance(metric, Metric)
            by_step.setdefault((metric.step, metric.key.partition("/")[0]), {})[metric.key] = metric.value
            self.held["runs"][run_id]["metrics"].append([metric.key, metric.value, metric.step])
        for (step, _), values in by_step.items():
            note("mlflow", "log", values=values, tables={}, step=step)
        self._save()

    def log_table(self, run_id, data, artifact_file):
        columns = [name for name in data if name != "step"]
        rows = [list(row) for row in zip(*(data[name] for name in columns), strict=True)]
        note("mlflow", "table", tables={"eval/samples": [columns, rows]}, step=int(data["step"][0]), file=artifact_file)

    def set_terminated(self, run_id, status=None):
        note("mlflow", "finish", done=status == "FINISHED")
