"""A stand-in for SwanLab: the calls that track/swanlab.py makes, with the real signatures' names."""

import os

from stand_in import keep, note


class Settings:
    def __init__(self, **settings):
        self.settings = settings


class echarts:
    class Table:
        def add(self, headers, rows):
            self.headers, self.rows = headers, rows


def init(*, project=None, workspace=None, name=None, id=None, resume=None, mode=None, log_dir=None, config=None, settings=None):
    keep(f"{log_dir}/run-{os.getpid()}-{id}", "run.swanlab")
    note(
        "swanlab", "init", project=project, name=name, id=id, config=config, mode=mode, workspace=workspace, resume=resume,
        settings=settings.settings, dir=log_dir,
    )  # fmt: skip


def log(data, step=None):
    values = {key: value for key, value in data.items() if not isinstance(value, echarts.Table)}
    tables = {key: [value.headers, value.rows] for key, value in data.items() if isinstance(value, echarts.Table)}
    note("swanlab", "log", values=values, tables=tables, step=step)


def finish(state="success"):
    note("swanlab", "finish", done=state == "success")
