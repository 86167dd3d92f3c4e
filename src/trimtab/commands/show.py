"""`trimtab show`: what a run or adapter folder contains."""

import argparse
from pathlib import Path

from trimtab.commands._parser import add_json
from trimtab.commands._terminal import print_json, terminal

HELP = "show what a run or adapter folder contains"
DESCRIPTION = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="FOLDER", type=Path)
    add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    from trimtab.report.folders import folder_facts, folder_page

    facts = folder_facts(arguments.target)
    if arguments.json:
        print_json(facts)
    else:
        terminal().print(folder_page(facts))
