"""SwanLab."""

import os
import shutil
from pathlib import Path
from typing import ClassVar

from trimtab.core.files import expand_user
from trimtab.track._base import Mode, Opening, Session, Text, Tracker, in_netrc
from trimtab.track._names import COLUMNS, Line


class SwanLab(Tracker):
    """SwanLab: in the cloud with a login, as files without one."""

    package: ClassVar[str] = "swanlab"
    workspace: Text | None = None
    """The user or organization to whom the project belongs; the login's own unless given."""
    mode: Mode = "auto"
    """`auto`: online with a login (SWANLAB_API_KEY, or `swanlab login`), else offline."""

    def online(self) -> bool:
        """Whether numbers are sent: only with a login, and if neither the recipe nor the environment says otherwise."""
        if self.mode != "auto":
            return self.mode == "online"
        if os.environ.get("SWANLAB_MODE", "online") not in ("online", "cloud"):
            return False
        root = os.environ.get("SWANLAB_ROOT") or os.environ.get("SWANLAB_SAVE_DIR") or "~/.swanlab"
        folders = (Path(".swanlab"), expand_user(root))
        return bool(os.environ.get("SWANLAB_API_KEY")) or any(in_netrc(folder / ".netrc") for folder in folders)

    def place(self, folder: Path) -> str:
        if self.online():
            return f"online, project {self.project} on {os.environ.get('SWANLAB_WEB_HOST', 'https://swanlab.cn')}, and files in {folder}"
        return f"offline, files in {folder}; after `swanlab login`, `swanlab sync {folder}/run-*` uploads them"

    def environment(self, folder: Path) -> dict[str, str | None]:
        return {"SWANLAB_MODE": None, "SWANLAB_LOG_DIR": None}

    def open(self, opening: Opening) -> "SwanLabRun":
        return SwanLabRun(opening, self)


class SwanLabRun(Session):
    """The run there, sent from its beginning: steps that it has already are ignored. Offline, its files are made anew."""

    def __init__(self, opening: Opening, tracker: SwanLab) -> None:
        import swanlab

        self.swanlab, online = swanlab, tracker.online()
        before = list(opening.folder.glob(f"run-*-{opening.id}"))
        self.run = swanlab.init(
            project=tracker.project, workspace=tracker.workspace, name=opening.name, id=opening.id, resume="allow",
            mode="online" if online else "offline", log_dir=str(opening.folder), config=opening.config,
            settings=swanlab.Settings(
                interactive=False, console={"proxy_type": "none"},
                probe={"hardware": False, "requirements": False, "conda": False, "git": False, "monitor": False},
            ),
        )  # fmt: skip
        for folder in before:
            shutil.rmtree(folder, ignore_errors=True)

    def log(self, line: Line) -> None:
        values: dict[str, object] = dict(line.values)
        if line.rows:
            table = self.swanlab.echarts.Table()
            table.add(list(COLUMNS), [[str(cell) for cell in row] for row in line.rows])
            values["eval/samples"] = table
        self.swanlab.log(values, step=line.step)

    def close(self, done: bool) -> None:
        self.swanlab.finish("success" if done else "aborted")
