"""The files of a run's folder, its record `run.json`, and its certificate."""

from pathlib import Path
from typing import Any

from trimtab.core import files
from trimtab.core.errors import ArtifactError

RUN = "run.json"
"""The record of the run. A folder that has it is a run."""
RECIPE = "recipe.yaml"
"""The recipe with every default written out."""
DATA = "data.json"
"""The counts of examples used and rejected, the held-out examples, and the data's hashes."""
METRICS = "metrics.jsonl"
"""One line for each optimizer step and each evaluation."""
LOSSES = "losses.json"
"""The loss of each validation example before training and of the best adapter: what runs are compared by."""
ADAPTER = "adapter"
"""The finished adapter."""
CHECKPOINTS = "checkpoints"
"""Adapters saved during training."""
STATES = "states"
"""The states that training resumes from; removed at the end of the run."""
START = "start"
"""The adapter that training started from, if it is the reference and saved nowhere else."""
LOCK = "lock"
"""Locked by the process that is training."""
REPORT = "report.html"
"""The report of the run, for people: made again from the other files whenever there is something new."""
TRACKERS = "trackers"
"""What trackers keep on this machine."""
CERTIFICATE, CERTIFICATE_TEXT = "certificate.json", "certificate.txt"
"""The certificate, for programs and for people."""
CERTIFICATE_FORMAT = 2
CERTIFICATE_KEYS = {"passed", "tests", "canaries", "answers", "losses", "files", "base", "data_digest", "versions"}
BEFORE_THE_FIRST_STEP = {LOCK, START, RECIPE, DATA}
"""The files that the folder can hold before `run.json` is written."""


def is_run(folder: Path) -> bool:
    return (folder / RUN).is_file()


def read_record(run: Path) -> dict[str, Any]:
    """The content of run.json. Raises ArtifactError if it is not the record of a run."""
    record = files.read_json(run / RUN)
    if not isinstance(record, dict):
        raise ArtifactError(f"{run / RUN}: is not the record of a run. Restore it from a copy.")
    return record


def read_certificate(run: Path) -> dict[str, Any]:
    """The content of certificate.json. Raises ArtifactError if it is missing or was changed."""
    return files.read_manifest(run / CERTIFICATE, CERTIFICATE_FORMAT, CERTIFICATE_KEYS)


def certified_files(run: Path) -> list[str]:
    """The files of a finished run that its certificate lists, by path within the run: all except itself, the states, the lock, and what
    is made from the others and may be made again: the report, and what trackers keep."""
    others = (f"{CERTIFICATE.partition('.')[0]}.", f"{STATES}/", LOCK, REPORT, f"{TRACKERS}/")
    paths = (path.relative_to(run).as_posix() for path in sorted(run.rglob("*")) if path.is_file())
    return [path for path in paths if not path.startswith(others)]
