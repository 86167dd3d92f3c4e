"""A stand-in for W&B: the calls that track/wandb.py makes, with the real signatures' names."""

import os

from stand_in import keep, note


class Settings:
    def __init__(self, **settings):
        self.settings = settings


class Table:
    def __init__(self, columns=None, data=None):
        self.columns, self.data = columns, data

    def __str__(self):
        return "table"


class Run:
    def __init__(self, starting_step):
        self.starting_step = starting_step

    def define_metric(self, name, step_metric=None, *, step_sync=None):
        note("wandb", "define", name=name, over=step_metric)

    def log(self, data, step=None):
        values = {key: value for key, value in data.items() if not isinstance(value, Table)}
        tables = {key: [value.columns, value.data] for key, value in data.items() if isinstance(value, Table)}
        note("wandb", "log", values=values, tables=tables, step=values["train/global_step"], number=step)

    def finish(self, exit_code=None):
        note("wandb", "finish", done=exit_code == 0)


def init(entity=None, project=None, dir=None, id=None, name=None, config=None, mode=None, resume=None, settings=None):
    keep(f"{dir}/wandb/offline-run-{os.getpid()}-{id}", "run.wandb")
    note(
        "wandb", "init", project=project, name=name, id=id, config=config, mode=mode, entity=entity, resume=resume,
        settings=settings.settings, dir=dir,
    )  # fmt: skip
    return Run(int(os.environ.get("STAND_IN_HOLDS", "0")))


def teardown():
    note("wandb", "teardown")
