"""`trimtab runs`: the runs below a folder, and how far each is."""

import argparse
from pathlib import Path

from trimtab.commands._parser import add_json
from trimtab.commands._terminal import print_json, terminal

HELP = "list the runs below a folder: their status, what they train, and their losses"
DESCRIPTION = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", metavar="FOLDER", nargs="?", type=Path, default=Path("runs"), help="where to look; runs unless given"
    )
    text = "newest first (the default), or by the lowest validation loss, objective by objective"
    parser.add_argument("--sort", choices=("newest", "loss"), default="newest", help=text)
    add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    from trimtab.report.runs import list_runs, runs_facts, runs_table

    runs = list_runs(arguments.folder, arguments.sort)
    if arguments.json:
        print_json({"runs": runs_facts(runs)})
    else:
        terminal().print(runs_table(runs, arguments.folder))
