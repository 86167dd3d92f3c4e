"""`trimtab report`: a run's report as a page, made again from the run's files."""

import argparse
from pathlib import Path

from trimtab.commands._terminal import terminal

HELP = "write the report of a run as an HTML page"
DESCRIPTION = "`trimtab train` writes it while it trains. This makes it again from the run's files alone."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", type=Path)
    parser.add_argument("--output", metavar="FILE", type=Path, help="write it there; RUN/report.html unless given")


def run(arguments: argparse.Namespace) -> None:
    from rich.markup import escape

    from trimtab.artifacts.run_folder import REPORT, is_run
    from trimtab.core import files
    from trimtab.core.errors import RecipeError, StorageError
    from trimtab.report.page.run_report import run_report

    folder = arguments.run_folder
    if not is_run(folder):
        raise RecipeError(f"{folder} is not a run folder." if folder.exists() else f"{folder}: no such folder.")
    output = arguments.output or folder / REPORT
    try:
        files.write_text(output, run_report(folder))
    except StorageError as error:
        if arguments.output is not None:
            raise
        raise StorageError(f"{error} `--output FILE` writes it elsewhere.") from None
    terminal().print(f"Read the report: {escape(str(output))}")
