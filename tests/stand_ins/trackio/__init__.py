"""A stand-in for Trackio: the calls that track/trackio.py makes, with the real signatures' names."""

import os
from pathlib import Path

from stand_in import keep, note


class Table:
    def __init__(self, columns=None, data=None):
        self.columns, self.data = columns, data


class Known:
    def __init__(self, path):
        self.name, self.path = path.name, path

    def delete(self):
        self.path.unlink()
        note("trackio", "delete", name=self.name)


class Api:
    def runs(self, project):
        folder = Path(os.environ["TRACKIO_DIR"]) / project
        if not folder.exists():
            raise ValueError(f"Project '{project}' does not exist")
        return [Known(path) for path in folder.iterdir()]


class Run:
    def log(self, metrics, step=None):
        values = {key: value for key, value in metrics.items() if not isinstance(value, Table)}
        tables = {key: [value.columns, value.data] for key, value in metrics.items() if isinstance(value, Table)}
        note("trackio", "log", values=values, tables=tables, step=step)

    def finish(self):
        note("trackio", "finish", done=True)


def init(project, name=None, *, config=None, resume="never", embed=True, auto_log_gpu=None, auto_log_cpu=None):
    keep(f"{os.environ['TRACKIO_DIR']}/{project}", name)
    note("trackio", "init", project=project, name=name, config=config, dir=os.environ["TRACKIO_DIR"])
    return Run()
