"""What a command is given to work on: a run, an adapter or a model."""

import argparse
from typing import TYPE_CHECKING

from trimtab.core.errors import RecipeError
from trimtab.core.process import gc_frozen
from trimtab.core.streams import write_stderr

if TYPE_CHECKING:
    from trimtab.deploy import LoadedModel


def open_target(arguments: argparse.Namespace, *, certified: bool = False, copies: int = 0) -> "LoadedModel":
    """Load `arguments.target`. See `deploy.load_model`."""
    with gc_frozen():
        from trimtab.deploy import load_model

    target = load_model(arguments.target, arguments.model, certified=certified, copies=copies)
    for note in target.notes:
        write_stderr(note)  # standard output may be JSON, or an answer
    return target


def open_to_compare(arguments: argparse.Namespace) -> "LoadedModel":
    """The same; with --base, it must have an adapter to compare the base model with."""
    target = open_target(arguments)
    if arguments.base and target.adapter is None:
        raise RecipeError(f"--base: {arguments.target} is a model without an adapter, so there is nothing to compare.")
    return target
