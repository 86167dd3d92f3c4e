"""`trimtab compare`: which of several runs is better, how sure that is, and what differs in how they were made."""

import argparse
from pathlib import Path

from trimtab.commands._parser import add_json
from trimtab.commands._terminal import print_json, terminal

HELP = "compare runs: their curves, their losses on the same examples, and what differs in their recipes"
DESCRIPTION = (
    "Losses are compared example by example, with 95 % intervals; verdicts are adjusted for the number of comparisons."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="two run folders or more")
    parser.add_argument("--html", metavar="FILE", type=Path, help="write the comparison as a page as well")
    add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    from trimtab.report.comparison import compare
    from trimtab.report.comparison_text import comparison_page

    compared = compare(arguments.runs)
    if arguments.html is not None:
        from trimtab.core import files
        from trimtab.report.comparison_page import comparison_html

        files.write_text(arguments.html, comparison_html(compared))
    if arguments.json:
        print_json(compared.plain())
        return
    console = terminal()
    for part in comparison_page(compared):
        console.print(part, soft_wrap=not console.is_terminal)  # sentences are broken between words
