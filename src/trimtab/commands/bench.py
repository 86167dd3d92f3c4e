"""`trimtab bench`: starts the comparison with peers, which is in benchmarks/peers of the repository."""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

from trimtab.core.errors import RecipeError

HELP = "train the same examples in Trimtab and in its peers, alternating, and compare speed, memory and losses"
DESCRIPTION = "It is run from a checkout of the repository."
FOLDER = Path(__file__).parents[3] / "benchmarks" / "peers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.prefix_chars = "\0"  # so that options, --help too, are words to pass on
    parser.add_argument("words", nargs="*")


def run(arguments: argparse.Namespace) -> int:
    """Run the benchmark in another process; returns its exit code."""
    if not (FOLDER / "__main__.py").is_file():
        raise RecipeError(
            "bench compares Trimtab with PEFT and TRL. It is a benchmark in Trimtab's repository and not part of the installed package: get a "
            f"checkout of the repository, and run there: {shlex.join(['python', 'benchmarks/peers', *arguments.words])}"
        )
    with subprocess.Popen([sys.executable, "-P", str(FOLDER), *arguments.words]) as process:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.terminate()  # it ends the runs that it started, and says so
            code = process.wait()
    return code if code >= 0 else 128 - code
