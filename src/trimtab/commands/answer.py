"""`trimtab answer`: the answers to all prompts of a file, as a file."""

import argparse
from pathlib import Path

from trimtab.commands._parser import TARGET, add_model
from trimtab.commands._target import open_to_compare
from trimtab.commands._terminal import terminal

HELP = "answer every prompt of a file, into a file"
DESCRIPTION = (
    "The output has a line of JSON for each prompt, in their order: where it stands, the prompt, the answer, and how it ended (stopped, or "
    "cut off by length or context). An interrupted command goes on where it stopped when it is given again."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="TARGET", help=TARGET)
    text = (
        "how answers are generated, for example eval.temperature=0.7 eval.max_new_tokens=200 (512 unless given); and how the prompts are "
        "read, for example data.columns.prompt=question data.bad_rows=skip; as the run's own unless given"
    )
    parser.add_argument("words", metavar="key=value", nargs="*", help=text)
    text = (
        "prompts, in any format that training reads, with the answers or without; answers that are there are kept as `expected`"
    )
    parser.add_argument("--data", metavar="FILE", required=True, help=text)
    parser.add_argument("--output", metavar="FILE", type=Path, required=True, help="a new file for the answers (JSON lines)")
    parser.add_argument("--base", action="store_true", help="the base model without the adapter answers, too")
    add_model(parser)


def run(arguments: argparse.Namespace) -> None:
    from rich.markup import escape

    from trimtab.core import files
    from trimtab.report import AnsweringBar
    from trimtab.run.answering import answer_file, answering_from, check_prompts

    files.refuse_existing(arguments.output)
    answering = answering_from(Path(arguments.target), arguments.data, arguments.words, base=arguments.base)
    target, console = open_to_compare(arguments), terminal()
    found, digest = check_prompts(target, answering)
    with AnsweringBar(console, found.prompts) as bar:
        done = answer_file(target, answering, arguments.output, digest, bar.of(""))
    kept = f" ({done.kept:,} of them were there already)" if done.kept else ""
    console.print(f"{found.prompts - found.unusable:,} answers{kept} are in {escape(str(arguments.output))}.")
    if found.unusable:
        console.print(f"[yellow]{found.unusable:,} rows hold no prompt that can be answered: their lines say why (error).[/]")
    if done.cut_off:
        console.print(
            f"{done.cut_off:,} {'of the new ' if done.kept else ''}answers were cut off: raise eval.max_new_tokens "
            f"({answering.max_new_tokens}) if that is too short."
        )
