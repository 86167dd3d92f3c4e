"""`trimtab combine`: one LoRA adapter as the weighted sum of several."""

import argparse
from pathlib import Path

from trimtab.commands._parser import add_force, add_model, integer
from trimtab.commands._terminal import terminal

HELP = "combine several LoRA adapters into one, as a weighted sum"
DESCRIPTION = "The result is exact unless a smaller rank is asked for; then the error is reported."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("parts", metavar="TARGET=WEIGHT", nargs="+", type=_part, help="a run or adapter folder and its weight")
    parser.add_argument("output", metavar="FOLDER", type=Path, help="a new folder for the adapter")
    parser.add_argument("--rank", metavar="N", type=integer(1), help="the largest rank that the result may have")
    add_force(parser)
    add_model(parser)


def _part(word: str) -> tuple[str, float]:
    target, equals, weight = word.rpartition("=")
    try:
        number = float(weight)
    except ValueError:
        number = float("nan")
    if not equals or not target or not abs(number) < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a folder and its weight, such as runs/first=0.5, got {word!r}")
    return target, number


def run(arguments: argparse.Namespace) -> None:
    from rich.markup import escape

    from trimtab.core import files
    from trimtab.deploy import combine_adapters

    files.refuse_existing(arguments.output)
    combined = combine_adapters(
        arguments.parts, arguments.output, rank=arguments.rank, model=arguments.model, certified=not arguments.force
    )
    exact = "exactly their weighted sum" if combined.error == 0 else f"their weighted sum with an error of {combined.error:.2%}"
    terminal().print(f"{escape(str(arguments.output))} is {exact}: {combined.adapter.method.name}, rank {combined.rank}.")
