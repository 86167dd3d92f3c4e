"""Which files and folders a run's folder has, and what `run.json` says of it."""

from pathlib import Path
from typing import Any

from trimtab.core import files
from trimtab.core.errors import ArtifactError

RUN = "run.json"
"""The record of the run, which makes a folder a run."""
RECIPE = "recipe.yaml"
"""The recipe with every default written out."""
DATA = "data.json"
"""Where every example went, which are held out, and what was checked."""
METRICS = "metrics.jsonl"
"""One line for each optimizer step and each evaluation."""
ADAPTER = "adapter"
"""The finished adapter."""
CHECKPOINTS = "checkpoints"
"""Adapters that were saved while training."""
STATES = "states"
"""What training resumes from; removed when the run has ended."""
START = "start"
"""The adapter that training started from, where it is the reference and is saved nowhere else."""
LOCK = "lock"
"""The file that one process holds while it trains there."""
CERTIFICATE, CERTIFICATE_TEXT = "certificate.json", "certificate.txt"
"""The certificate, for programs and for people."""
BEFORE_THE_FIRST_STEP = {LOCK, START, RECIPE, DATA}
"""All that the folder can hold before `run.json` makes it a run."""


def is_run(folder: Path) -> bool:
    return (folder / RUN).is_file()


def read_record(run: Path) -> dict[str, Any]:
    """What run.json says. Raises ArtifactError if it is no record of a run."""
    facts = files.read_json(run / RUN)
    if not isinstance(facts, dict):
        raise ArtifactError(f"{run / RUN}: is not the record of a run. Restore it from a copy.")
    return facts


def certified_files(run: Path) -> list[str]:
    """The files of a finished run that its certificate lists: all but itself, the states and the lock. By path within the run."""
    paths = (path.relative_to(run).as_posix() for path in sorted(run.rglob("*")) if path.is_file())
    return [path for path in paths if not path.startswith((f"{CERTIFICATE.partition('.')[0]}.", f"{STATES}/", LOCK))]
