"""What a command is given to work on: a run, an adapter or a model."""

import argparse
from typing import TYPE_CHECKING

from trimtab.core.errors import RecipeError
from trimtab.core.process import without_collector
from trimtab.core.streams import complain

if TYPE_CHECKING:
    from trimtab.deploy import Target


def open_target(arguments: argparse.Namespace, *, certified: bool = False) -> "Target":
    """Load `arguments.target`. See `deploy.open_target`."""
    with without_collector():
        from trimtab.deploy import open_target

    target = open_target(arguments.target, arguments.model, certified=certified)
    for note in target.notes:
        complain(note)  # standard output may be JSON, or an answer
    return target


def open_to_compare(arguments: argparse.Namespace) -> "Target":
    """The same; with --base, it must have an adapter to compare the base model with."""
    target = open_target(arguments)
    if arguments.base and target.adapter is None:
        raise RecipeError(f"--base: {arguments.target} is a model without an adapter, so there is nothing to compare.")
    return target
