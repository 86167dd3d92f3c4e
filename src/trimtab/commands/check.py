"""`trimtab check`: what a recipe would train on, checked and shown, without training."""

import argparse
from datetime import datetime
from pathlib import Path

from trimtab.commands._parser import integer
from trimtab.commands._terminal import print_json, status, terminal
from trimtab.core.process import gc_frozen
from trimtab.core.processes import processes

HELP = "validate a recipe and preview the tokenized data, without training"
DESCRIPTION = "Exit code 3 if training on it would be meaningless. `trimtab train` runs the same checks."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE.yaml", type=Path)
    parser.add_argument("words", metavar="key=value", nargs="*", help="keys of the recipe, for example data.max_length=512")
    text = "show the first N examples, the shortest and the longest"
    parser.add_argument("--show", metavar="N", type=integer(0), default=3, help=text)
    parser.add_argument("--html", metavar="FILE", type=Path, help="write the same as an HTML page")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(arguments: argparse.Namespace) -> None:
    from trimtab.core import yaml12

    yaml12.load_file(arguments.recipe)
    console = terminal()
    with status(console), gc_frozen():
        from trimtab.core import files
        from trimtab.data import refuse_problems
        from trimtab.deploy import versions
        from trimtab.report.checks import checks_table, verdict
        from trimtab.report.page.check_page import checks_page
        from trimtab.run.preflight import check_disk, memory_needed, preflight, preview
        from trimtab.run.recipe import Recipe
        from trimtab.run.start import open_recipe

    recipe = Recipe.read(arguments.recipe, arguments.words)
    with status(console) as stage:
        opened = open_recipe(recipe, on_stage=stage)
        stage("checking the data, the adapter and the disk")
        findings, examples = [*preflight(opened), memory_needed(opened)], preview(opened.base, opened.data, arguments.show)
    if arguments.html is not None and processes.first:
        date, version = f"{datetime.now():%Y-%m-%d %H:%M}", f"Trimtab {versions()['trimtab']}"
        about = (str(arguments.recipe), opened.base.source, date, version)
        files.write_text(arguments.html, checks_page(findings, examples, about, recipe.to_yaml()))
    if arguments.json:
        result, text = verdict(findings)
        print_json({"status": result, "verdict": text, "findings": [finding.plain() for finding in findings], "rows": examples})
    else:
        console.print(checks_table(findings, examples))
    if processes.first:  # who writes
        check_disk(findings)
    refuse_problems(findings)
