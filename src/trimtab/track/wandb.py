"""Weights & Biases."""

import os
import shutil
from pathlib import Path
from typing import ClassVar

from trimtab.core.files import expand_user
from trimtab.track._base import Mode, Opening, Session, Text, Tracker, in_netrc
from trimtab.track._names import COLUMNS, Line

STEP = "train/global_step"
"""What curves are drawn over: the base model's evaluation, of step 0, comes after training has begun."""


class WandB(Tracker):
    """Weights & Biases: in the cloud with a login, as files without one."""

    package: ClassVar[str] = "wandb"
    entity: Text | None = None
    """The user or team to whom the project belongs; the login's default unless given."""
    mode: Mode = "auto"
    """`auto`: online with a login (WANDB_API_KEY, or `wandb login`), else offline."""

    def online(self) -> bool:
        """Whether numbers are sent: only with a login, and if neither the recipe nor the environment says otherwise."""
        if self.mode != "auto":
            return self.mode == "online"
        if os.environ.get("WANDB_MODE", "online") not in ("online", "run"):
            return False
        files = [Path(os.environ["NETRC"])] if os.environ.get("NETRC") else [expand_user("~/.netrc"), expand_user("~/_netrc")]
        host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").partition("://")[2].strip("/").partition("/")[0]
        hosts = {host, host.partition(":")[0]}
        return bool(os.environ.get("WANDB_API_KEY")) or any(in_netrc(file, *hosts) for file in files)

    def place(self, folder: Path) -> str:
        if self.online():
            address = os.environ.get("WANDB_BASE_URL", "https://wandb.ai").replace("api.wandb.ai", "wandb.ai")
            return f"online, project {self.project} on {address}, and files in {folder}"
        return f"offline, files in {folder}; after `wandb login`, `wandb sync {folder}/offline-run-*` uploads them"

    def environment(self, folder: Path) -> dict[str, str | None]:
        return {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false", "WANDB_DIR": str(folder.parent), "WANDB_MODE": None}

    def open(self, opening: Opening) -> "WandBRun":
        return WandBRun(opening, self)


class WandBRun(Session):
    """The run there. Offline, its files are made anew from the beginning: two folders of one run would overwrite each other on the server."""

    def __init__(self, opening: Opening, tracker: WandB) -> None:
        import wandb

        self.wandb, online = wandb, tracker.online()
        before = list(opening.folder.glob(f"offline-run-*-{opening.id}"))
        self.run = wandb.init(
            project=tracker.project, entity=tracker.entity, name=opening.name, id=opening.id, resume="allow" if online else None,
            mode="online" if online else "offline", dir=str(opening.folder.parent), config=opening.config,
            settings=wandb.Settings(
                silent=True, console="off", disable_git=True, disable_code=True, save_code=False, x_disable_stats=True,
                x_disable_meta=True, x_save_requirements=False,
            ),
        )  # fmt: skip
        self.run.define_metric(STEP)
        self.run.define_metric("*", step_metric=STEP, step_sync=True)
        self.first = self.run.starting_step if online else 0
        for folder in before:
            shutil.rmtree(folder, ignore_errors=True)

    def has(self, line: Line) -> bool:
        return line.number < self.first

    def log(self, line: Line) -> None:
        table = {"eval/samples": self.wandb.Table(columns=list(COLUMNS), data=line.rows)} if line.rows else {}
        self.run.log({**line.values, **table, STEP: line.step}, step=line.number)

    def close(self, done: bool) -> None:
        self.run.finish(exit_code=0 if done else 1)
        self.wandb.teardown()
