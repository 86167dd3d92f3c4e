"""`trimtab convert`: a recipe from a file of Axolotl, LLaMA-Factory, ms-swift, Unsloth or TRL."""

import argparse
from pathlib import Path

from trimtab.commands._parser import integer
from trimtab.commands._terminal import say, terminal

HELP = "convert a file of Axolotl, LLaMA-Factory, ms-swift, Unsloth or TRL to a recipe"
DESCRIPTION = (
    "Prints what became of each of its settings, and the recipe, or writes it to --output. Of TRL and PEFT, the file holds the arguments of "
    'LoraConfig, SFTConfig, DPOConfig or KTOConfig as JSON: {"LoraConfig": {…}, "SFTConfig": {…}}, or flat; of Unsloth, those of its functions '
    "as FastLanguageModel (from_pretrained) and get_peft_model; of ms-swift, those of swift sft, pt or rlhf."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", type=Path, help="a YAML or JSON file")
    parser.add_argument("words", metavar="key=value", nargs="*", help="keys of the recipe, for example data.train=train.jsonl")
    parser.add_argument("--output", metavar="RECIPE.yaml", type=Path, help="a new file for the recipe")
    tools = ("axolotl", "llamafactory", "swift", "trl")
    parser.add_argument("--from", dest="tool", choices=tools, help="whose file it is, if its keys do not say so")
    text = "on how many devices it trained: a factor of its effective batch size (default: %(default)s)"
    parser.add_argument("--devices", metavar="N", type=integer(1), default=1, help=text)


def run(arguments: argparse.Namespace) -> None:
    from trimtab.core import files
    from trimtab.core.streams import write_stderr
    from trimtab.migrate import account, convert

    if arguments.output is not None:
        files.refuse_existing(arguments.output)
    conversion = convert(arguments.file, arguments.tool, tuple(arguments.words), devices=arguments.devices)
    if arguments.output is None:
        write_stderr(account(conversion.settings))
        say(conversion.text, end="")
        return
    files.write_text(arguments.output, conversion.text)
    say(account(conversion.settings))
    terminal().print(f"\nThe recipe: {arguments.output}. Next: trimtab check {arguments.output}", markup=False)
