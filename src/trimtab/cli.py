"""The command line: which commands and words there are, and what an error becomes."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from trimtab import __version__, commands
from trimtab.commands import bench
from trimtab.commands._words import Parser
from trimtab.core import interrupts, process, streams
from trimtab.core.errors import StorageError, TrimtabError

MODEL = "a folder, a GGUF file, a hub name, or smollm2-135m-instruct"
INTERRUPTED = 130
TARGET = "a run folder, an adapter folder, or a model (folder, GGUF file, hub name, smollm2-135m-instruct)"


def main(words: Sequence[str] | None = None, parser: Callable[[], argparse.ArgumentParser] | None = None) -> int:
    """Run a command; returns its exit code (see errors.py).

    Args:
        parser: Makes another program's parser, which sets `command` and `debug`: what ends it is treated in the same way.
    """
    streams.ready()
    with interrupts.as_keyboard_interrupt(to_the_end=words is None) as came:
        try:
            return _run((parser or _parser)().parse_args(words))
        except KeyboardInterrupt:  # another one, while the first was being answered
            return INTERRUPTED
        except Exception:
            if not came():
                raise
            return _fail("interrupted.", INTERRUPTED)  # as what it came in the middle of says: an import, say


def _run(arguments: argparse.Namespace) -> int:
    os.environ.update(process.environment())  # before a command imports torch
    try:
        code = arguments.command(arguments)
        sys.stdout.flush()
        return code or 0
    except TrimtabError as error:
        if arguments.debug:
            raise
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt as error:
        return _fail(f"interrupted{f': {error}' if str(error) else ''}.", INTERRUPTED)
    except BrokenPipeError:  # the reader of our output left, as `head` does
        _close_output()
    except OSError as error:  # files.py says what its own were about
        if arguments.debug:
            raise
        _close_output()
        return _fail(f"{error.filename or 'standard output'}: {error.strerror or error}.", StorageError.exit_code)
    return 0


def _fail(message: str, exit_code: int) -> int:
    streams.complain(message)
    return exit_code


def _close_output() -> None:
    """Let what is still to be written out go nowhere: Python would complain of it at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="trimtab",
        description="Fine-tune a language model by training a small adapter on it, see what it gained, and hand it over.",
        epilog="Start with: trimtab train RECIPE.yaml. `trimtab COMMAND --help` tells more.",
    )
    parser.add_argument("--version", action="version", version=f"trimtab {__version__}")
    choices = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, run: Callable[[argparse.Namespace], int | None], text: str, more: str = "") -> argparse.ArgumentParser:
        command = choices.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}. {more}".strip())
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.set_defaults(command=run)
        return command

    train = add(
        "train", commands.train, "train an adapter as a recipe says", "Any key of the recipe can be given as section.key=value."
    )
    train.add_argument("recipe", metavar="RECIPE.yaml", type=Path)
    train.add_argument(
        "words", metavar="key=value", nargs="*", help="keys of the recipe, for example train.lr=1e-4 method.rank=8"
    )

    text = "look at what a recipe would learn from, without training"
    more = "Ends with exit code 3 if that would be meaningless. `trimtab train` looks at the same."
    _check_words(add("check", commands.check, text, more))

    _eval_words(add("eval", commands.evaluate, "measure loss and exact answers on rows it has not learned"))
    _chat_words(add("chat", commands.chat, "talk to a model"))

    text = "fold an adapter into its base, as a plain model folder"
    _merge_words(add("merge", commands.merge, text, "It is checked against the adapter, and says what is lost by rounding."))
    text = "make one LoRA of several, as a weighted sum"
    more = "The result is exact unless a smaller rank is asked for; then it says how much is lost."
    _combine_words(add("combine", commands.combine, text, more))

    text = "list the adapter methods, and what each would train on a model"
    more = "With keys, such as method.rank=8, or a recipe: which modules that method would replace. No weights are read."
    methods = add("methods", commands.methods, text, more)
    methods.add_argument(
        "words", metavar="MODEL|RECIPE.yaml [key=value …]", nargs="*", help=f"{MODEL}, or a recipe; and its keys"
    )
    methods.add_argument("--json", action="store_true", help="print one JSON object")

    bench.add_arguments(add("bench", bench.run, bench.HELP, bench.DESCRIPTION))

    _proof_words(add)
    return parser


def _proof_words(add: Callable[..., argparse.ArgumentParser]) -> None:
    text = "repeat what a run's certificate says: its files, and what its adapter does in a fresh process; or check an adapter"
    verify = add(
        "verify", commands.verify, text, "Ends with exit code 4 if a file is not what it was, 7 if the adapter is not."
    )
    verify.add_argument("target", metavar="RUN|ADAPTER", type=Path)
    verify.add_argument("--json", action="store_true", help="print the certificate as JSON")
    _model_option(verify)

    text = "find out whether an upgrade of a library has broken something, in under a minute"
    more = "Every method is tried on a small made-up model: packing, gradients, decoding, saving, merging."
    doctor = add("doctor", commands.doctor, text, more)
    doctor.add_argument("--json", action="store_true", help="print one JSON object")

    show = add("show", commands.show, "tell what is in a run or adapter folder")
    show.add_argument("target", metavar="FOLDER", type=Path)
    show.add_argument("--json", action="store_true", help="print one JSON object")


def _check_words(check: argparse.ArgumentParser) -> None:
    check.add_argument("recipe", metavar="RECIPE.yaml", type=Path)
    check.add_argument("words", metavar="key=value", nargs="*", help="keys of the recipe, for example data.max_length=512")
    check.add_argument(
        "--show", metavar="N", type=_whole(0), default=3, help="show the first N rows, the shortest and the longest"
    )
    check.add_argument("--html", metavar="FILE", type=Path, help="write the same as a page")
    check.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def _merge_words(merge: argparse.ArgumentParser) -> None:
    merge.add_argument("target", metavar="TARGET", help="a run folder or an adapter folder")
    merge.add_argument("output", metavar="FOLDER", type=Path, help="a new folder for the model")
    dtypes = ("float32", "bfloat16", "float16")
    merge.add_argument("--dtype", choices=dtypes, default="float32", help="number type of its weights (default: %(default)s)")
    _force_option(merge)
    _model_option(merge)


def _combine_words(combine: argparse.ArgumentParser) -> None:
    combine.add_argument("parts", metavar="TARGET=WEIGHT", nargs="+", type=_part, help="a run or adapter folder and its weight")
    combine.add_argument("output", metavar="FOLDER", type=Path, help="a new folder for the adapter")
    combine.add_argument("--rank", metavar="N", type=_whole(1), help="the largest rank that the result may have")
    _force_option(combine)
    _model_option(combine)


def _force_option(command: argparse.ArgumentParser) -> None:
    command.add_argument("--force", action="store_true", help="take an adapter whose run is not certified, too")


def _eval_words(score: argparse.ArgumentParser) -> None:
    score.add_argument("target", metavar="TARGET", help=TARGET)
    text = "how the rows of --data are read, such as data.columns.prompt=question; as the run's own unless given"
    score.add_argument("words", metavar="key=value", nargs="*", help=text)
    score.add_argument("--data", metavar="FILE", help="rows to measure on; a run's own held-out rows unless given")
    score.add_argument("--base", action="store_true", help="measure the base without the adapter as well")
    score.add_argument("--show", metavar="N", type=_whole(0), default=0, help="show N answers beside the expected ones")
    score.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    _model_option(score)


def _chat_words(chat: argparse.ArgumentParser) -> None:
    chat.add_argument("target", metavar="TARGET", help=TARGET)
    chat.add_argument("--prompt", metavar="TEXT", help="ask this one question and end")
    chat.add_argument("--base", action="store_true", help="show the base's answer beside the adapter's")
    chat.add_argument("--system", metavar="TEXT", help="the system message")
    chat.add_argument("--max-new-tokens", metavar="N", type=_whole(1), default=512)
    chat.add_argument(
        "--temperature", metavar="T", type=_temperature, default=0.0, help="0 (the default) always takes the likeliest token"
    )
    chat.add_argument(
        "--seed", metavar="N", type=_whole(0), default=0, help="decides the draws when the temperature is above 0"
    )
    _model_option(chat)


def _model_option(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", metavar="NAME", help="the base to put the adapter on, if not where the adapter says")


def _whole(least: int, most: int = 2**32 - 1) -> Callable[[str], int]:
    def number(word: str) -> int:
        if not word.isdecimal() or not least <= int(word) <= most:
            raise argparse.ArgumentTypeError(f"expected a whole number from {least} to {most}, got {word!r}")
        return int(word)

    return number


def _part(word: str) -> tuple[str, float]:
    target, equals, weight = word.rpartition("=")
    try:
        number = float(weight)
    except ValueError:
        number = float("nan")
    if not equals or not target or not abs(number) < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a folder and its weight, such as runs/first=0.5, got {word!r}")
    return target, number


def _temperature(word: str) -> float:
    try:
        number = float(word)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {word!r}")
    return number
