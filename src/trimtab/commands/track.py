"""`trimtab track`: send a run's metrics to an experiment tracker, after it or again."""

import argparse
import math
from pathlib import Path

from trimtab.commands._terminal import status, terminal

HELP = "send a run's metrics to an experiment tracker"
DESCRIPTION = (
    "Sends all of the run's metrics.jsonl: of a run that had no tracker, or whose tracker failed. What the tracker has already is not there "
    "twice. To follow a run while it trains, name trackers in its recipe: track=[wandb]."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", type=Path)
    parser.add_argument("--to", metavar="NAME", required=True, help="swanlab, wandb, tensorboard, mlflow or trackio")
    parser.add_argument("words", metavar="key=value", nargs="*", help="its settings, for example project=mine")


def run(arguments: argparse.Namespace) -> None:
    from trimtab.artifacts import is_run, read_record
    from trimtab.artifacts.run_folder import LOCK, TRACKERS
    from trimtab.core import locks, yaml12
    from trimtab.core.errors import ArtifactError, RecipeError, StorageError
    from trimtab.track import Tracker, TrackerProcess

    settings = {"name": arguments.to}
    for word in arguments.words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise RecipeError(f"{word!r}: expected key=value, for example project=mine.")
        settings[key] = yaml12.load(value, repr(word), lines=False)
    tracker: Tracker = Tracker.member(settings.pop("name")).parse(settings)
    tracker.check_available()
    folder = arguments.run_folder
    if not is_run(folder):
        raise ArtifactError(f"{folder}: is not the folder of a run. Give one that `trimtab train` has made.")
    if locks.is_locked(folder / LOCK):
        raise StorageError(
            f"{folder}: is being trained. Send it when that has ended: what is sent now would count as all of it."
        )
    console, process = terminal(), TrackerProcess(tracker, folder)
    with status(console) as stage:
        stage(f"sending to {tracker.name}")
        process.start()
        process.finish(read_record(folder).get("status", ""))
        problem = process.wait(math.inf)
    if problem is not None:
        raise StorageError(f"{problem}.")
    console.print(f"{process.lines:,} lines of {folder}/metrics.jsonl sent", markup=False)
    console.print(f"{tracker.name}: {tracker.place(folder / TRACKERS / tracker.name)}", markup=False)
