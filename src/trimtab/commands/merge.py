"""`trimtab merge`: an adapter and its base model as one standalone model folder."""

import argparse
from pathlib import Path

from trimtab.commands._parser import add_force, add_model
from trimtab.commands._target import open_target
from trimtab.commands._terminal import terminal
from trimtab.core.errors import RecipeError

HELP = "merge an adapter into its base model and save a standalone model"
DESCRIPTION = "The saved model is loaded again and its logits are compared with the adapter's; loss by rounding is reported."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="TARGET", help="a run folder, an adapter folder or an adapter's name on the hub")
    parser.add_argument("output", metavar="FOLDER", type=Path, help="a new folder for the model")
    dtypes = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, default="float32", help="dtype of its weights (default: %(default)s)")
    add_force(parser)
    add_model(parser)


def run(arguments: argparse.Namespace) -> None:
    import torch
    from rich.markup import escape

    from trimtab.core import files
    from trimtab.deploy import COPIES, MIN_RETAINED, merge

    files.refuse_existing(arguments.output)
    target = open_target(arguments, certified=not arguments.force, copies=COPIES)
    if target.adapter is None:
        raise RecipeError(f"{arguments.target} is a model without an adapter: there is nothing to merge.")
    merged = merge(target.base, target.adapter, arguments.output, dtype=getattr(torch, arguments.dtype))
    console = terminal()
    console.print(
        f"Merged {merged.matrices} matrices into {escape(str(arguments.output))} ({arguments.dtype}). Loaded again by Transformers, its "
        f"logits differ from the adapter's by at most {merged.max_logit_difference:.2g} (largest logit {merged.logit_scale:.3g}); "
        f"the most likely token is the same at {merged.same_top_token:.1%} of positions."
    )
    if merged.retained < MIN_RETAINED:
        console.print(
            f"[yellow]Rounding to {arguments.dtype} keeps {merged.retained:.1%} of the adapter's change.[/] If that is too little, merge in "
            "float32, or use the adapter beside its base model."
        )
    elif arguments.dtype != "float32":
        console.print(f"Rounding to {arguments.dtype} keeps {merged.retained:.1%} of the adapter's change.")
