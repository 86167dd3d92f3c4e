"""`trimtab train`: train an adapter from a recipe."""

import argparse
import shlex
from pathlib import Path

from trimtab.commands._terminal import status, terminal
from trimtab.core.errors import TrimtabError
from trimtab.core.process import gc_frozen
from trimtab.launch import start_processes, starts_processes

HELP = "train an adapter from a recipe"
DESCRIPTION = "Any key of the recipe can be given as section.key=value."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE.yaml", type=Path)
    text = "keys of the recipe, for example train.lr=1e-4 method.rank=8"
    parser.add_argument("words", metavar="key=value", nargs="*", help=text)


def run(arguments: argparse.Namespace) -> int:
    from rich.markup import escape

    from trimtab.core import yaml12

    yaml12.load_file(arguments.recipe)  # a mistake in it is reported before torch is imported
    console = terminal(lasting=True)
    with status(console), gc_frozen():
        from trimtab.artifacts.run_folder import REPORT
        from trimtab.report import Terminal
        from trimtab.run.recipe import Recipe
        from trimtab.run.script import run_recipe

    recipe = Recipe.read(arguments.recipe, arguments.words)
    if starts_processes(recipe.devices):
        return start_processes(recipe.devices, recipe.model.device, arguments.command_line)
    try:
        with Terminal(console) as observer:
            run_recipe(recipe, observer)
    except TrimtabError as error:
        if error.free_folder is None:
            raise
        raise type(error)(f"{error} The command for that:\n  {_command_into(error.free_folder, arguments)}") from None
    folder = escape(shlex.quote(str(recipe.output)))
    report = escape(str(recipe.output / REPORT))
    console.print(
        f"[dim]Chat with it:[/]    trimtab chat {folder}\n[dim]Look inside:[/]     trimtab show {folder}\n[dim]Read the report:[/] {report}"
    )
    return 0


def _command_into(folder: Path, arguments: argparse.Namespace) -> str:
    """The same command with another output folder."""
    from trimtab.core.config import override

    others = [key for key in arguments.words if not key.startswith("output=")]
    return shlex.join(["trimtab", "train", str(arguments.recipe), *others, override("output", str(folder))])
