"""`trimtab init`: a commented recipe that trains on a data file."""

import argparse
import shlex
from pathlib import Path

from trimtab.commands._parser import MODEL
from trimtab.commands._terminal import status, terminal
from trimtab.core.errors import RecipeError
from trimtab.core.process import gc_frozen

HELP = "write a recipe that trains on a data file or folder"
DESCRIPTION = "It asks nothing: what it finds in the data is in the recipe's comments, and what it inferred is called so."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA", help="a file, a folder, a pattern of files, or a dataset on the hub")
    parser.add_argument("--output", metavar="FILE", type=Path, help="the recipe to write; named after the data unless given")
    parser.add_argument("--model", metavar="NAME", default="smollm2-135m-instruct", help=f"{MODEL} (default: %(default)s)")


def run(arguments: argparse.Namespace) -> None:
    from rich.markup import escape

    console = terminal()
    with status(console) as stage, gc_frozen():
        from trimtab.core import files
        from trimtab.run.draft import default_name, draft

        file = arguments.output or Path(f"{default_name(arguments.data)}.yaml")
        if file.exists():
            raise RecipeError(f"{file} exists already, and is not overwritten. Give another name with --output.")
        stage("reading the data")
        drafted = draft(arguments.data, arguments.model, f"runs/{file.stem}")
    files.write_text(file, drafted.recipe)
    console.print(f"[bold]{escape(arguments.data)}[/]")
    for line in drafted.found:
        console.print(f"  {escape(line)}")
    console.print("\n[bold]The first example[/]")
    for line in drafted.example:
        console.print(f"  {escape(line)}", style="dim")
    name = escape(shlex.quote(str(file)))
    console.print(f"\n[bold]Wrote {escape(str(file))}.[/] Next:\n  trimtab check {name}\n  trimtab train {name}")
