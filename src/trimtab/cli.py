"""The command line: words and pages, no logic. Heavy imports happen in the command that needs them."""

import argparse
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab import __version__
from trimtab.errors import DataError, RecipeError, StorageError, TrimtabError, listing
from trimtab.startup import without_collector

if TYPE_CHECKING:
    from rich.console import Console

    from trimtab.deploy import Target

TARGET = "a run folder, an adapter folder, or a model (folder, GGUF file, hub name, smollm2-135m-instruct)"


def main(words: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code (see errors.py)."""
    arguments = _parser().parse_args(words)
    signal.signal(signal.SIGTERM, _interrupt)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        arguments.command(arguments)
        sys.stdout.flush()
    except TrimtabError as error:
        if arguments.debug:
            raise
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt as error:
        return _fail(f"interrupted{f': {error}' if str(error) else ''}.", 130)
    except BrokenPipeError:  # the reader of our output left, as `head` does
        _close_output()
    except OSError as error:  # files.py says what its own were about
        if arguments.debug:
            raise
        _close_output()
        return _fail(f"{error.filename or 'standard output'}: {error.strerror or error}.", StorageError.exit_code)
    return 0


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _fail(message: str, exit_code: int) -> int:
    print(f"trimtab: {message}", file=sys.stderr)  # noqa: T201
    return exit_code


def _close_output() -> None:
    """Let what is still to be written out go nowhere: Python would complain of it at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trimtab",
        description="Fine-tune a language model by training a small adapter on it, see what it gained, and hand it over.",
        epilog="Start with: trimtab train RECIPE.yaml. `trimtab COMMAND --help` tells more.",
    )
    parser.add_argument("--version", action="version", version=f"trimtab {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, run: Callable[[argparse.Namespace], None], text: str, more: str = "") -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}. {more}".strip())
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.set_defaults(command=run)
        return command

    train = add(
        "train", _train, "train an adapter as a recipe says", "Any key of the recipe can be given as section.key=value."
    )
    train.add_argument("recipe", metavar="RECIPE.yaml", type=Path)
    train.add_argument(
        "words", metavar="key=value", nargs="*", help="keys of the recipe, for example train.lr=1e-4 method.rank=8"
    )

    _eval_words(add("eval", _eval, "measure loss and exact answers on rows it has not learned"))
    _chat_words(add("chat", _chat, "talk to a model"))

    merge = add(
        "merge",
        _merge,
        "fold an adapter into its base, as a plain model folder",
        "The result is float32, and is checked against the adapter.",
    )
    merge.add_argument("target", metavar="TARGET", help="a run folder or an adapter folder")
    merge.add_argument("output", metavar="FOLDER", type=Path, help="a new folder for the model")
    _model_option(merge)

    show = add("show", _show, "tell what is in a run or adapter folder")
    show.add_argument("target", metavar="FOLDER", type=Path)
    show.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _eval_words(score: argparse.ArgumentParser) -> None:
    score.add_argument("target", metavar="TARGET", help=TARGET)
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


def _temperature(word: str) -> float:
    try:
        number = float(word)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {word!r}")
    return number


def _console() -> "Console":
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True)


def _train(arguments: argparse.Namespace) -> None:
    from rich.markup import escape

    with without_collector():
        from trimtab.config import read
        from trimtab.recipe import Recipe
        from trimtab.report import Terminal
        from trimtab.run import run_recipe

    recipe = read(Recipe, arguments.recipe, arguments.words)
    console = _console()
    with Terminal(console) as watch:
        run_recipe(recipe, watch)
    folder = escape(shlex.quote(str(recipe.output)))
    console.print(f"[dim]Talk to it:[/]     trimtab chat {folder}\n[dim]Look inside:[/]    trimtab show {folder}")


def _eval(arguments: argparse.Namespace) -> None:
    from trimtab.evaluate import score
    from trimtab.report import Answering
    from trimtab.report.tables import answers_table, scores_table
    from trimtab.run import held_out

    if arguments.data is None:
        examples, source = held_out(Path(arguments.target))
    else:
        from trimtab.data import load_examples

        examples, account = load_examples(arguments.data)
        source = arguments.data
        if account.refused:
            problems = listing([f"{where}: {reason}" for where, reason in account.refused])
            raise DataError(f"data: rows that can't be measured:\n{problems}")
    target = _open(arguments)
    console, name, scores = _console(), "adapter" if target.adapter else "model", {}
    with Answering(console, len(examples), quiet=arguments.json) as answering:
        if arguments.base and target.adapter is not None:
            with target.adapter.disabled():
                scores["base"] = score(target.base, examples, answering.of("base"))
        scores[name] = score(target.base, examples, answering.of(name))
    if arguments.json:
        _print_json({"data": str(source), **scores.pop(name), **scores})
        return
    console.print(scores_table(scores, str(source)))
    if arguments.show:
        console.print(answers_table({name: one["answers"][: arguments.show] for name, one in scores.items()}))


def _open(arguments: argparse.Namespace) -> "Target":
    with without_collector():
        from trimtab.deploy import open_target

    target = open_target(arguments.target, arguments.model)
    if arguments.base and target.adapter is None:
        raise RecipeError(f"--base: {arguments.target} is a model without an adapter, so there is nothing to compare.")
    return target


def _chat(arguments: argparse.Namespace) -> None:
    from rich.markup import escape

    target = _open(arguments)
    talk: list[dict[str, str]] = [{"role": "system", "content": arguments.system}] if arguments.system else []
    if arguments.prompt is not None:
        _reply(target, [*talk, {"role": "user", "content": arguments.prompt}], arguments)
        return
    console = _console()
    place = escape(str(target.folder or target.base.source))
    console.print(f"[dim]{place}: write a message; /new starts afresh, /quit ends.[/]")
    start = len(talk)
    while True:
        try:
            words = console.input("[bold]> [/]").strip()
        except EOFError:
            console.print()
            return
        if words in ("/quit", "/exit"):
            return
        if words == "/new":
            del talk[start:]
        elif words:
            if not target.base.has_template:
                talk.clear()  # it continues a text, and knows of no conversation
            talk.append({"role": "user", "content": words})
            talk.append({"role": "assistant", "content": _reply(target, talk, arguments)})


def _reply(target: "Target", talk: list[dict[str, str]], arguments: argparse.Namespace) -> str:
    from trimtab.api import stream

    def say(label: str) -> str:
        if label:
            print(f"[{label}] ", end="", flush=True)  # noqa: T201
        said = ""
        for piece in stream(
            target.base, talk, max_new_tokens=arguments.max_new_tokens, temperature=arguments.temperature, seed=arguments.seed
        ):
            said += piece
            print(piece, end="", flush=True)  # noqa: T201
        print()  # noqa: T201
        return said

    if arguments.base and target.adapter is not None:
        with target.adapter.disabled():
            say("base")
        return say("adapter")
    return say("")


def _merge(arguments: argparse.Namespace) -> None:
    from rich.markup import escape

    from trimtab import files
    from trimtab.deploy import merge, open_target

    files.refuse_existing(arguments.output)
    target = open_target(arguments.target, arguments.model)
    if target.adapter is None:
        raise RecipeError(f"{arguments.target} is a model without an adapter: there is nothing to merge.")
    done = merge(target.base, target.adapter, arguments.output)
    _console().print(
        f"Merged {done.matrices} matrices into {escape(str(arguments.output))} (float32). Loaded again by Transformers, its logits differ from "
        f"the adapter's by at most {done.max_logit_difference:.2g} (largest logit {done.logit_scale:.3g}); "
        f"likeliest token the same at {done.same_choice:.1%}."
    )


def _show(arguments: argparse.Namespace) -> None:
    from trimtab.report.tables import describe, described

    facts = described(arguments.target)
    if arguments.json:
        _print_json(facts)
    else:
        _console().print(describe(facts))


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))  # noqa: T201
