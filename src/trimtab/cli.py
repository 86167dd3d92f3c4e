"""The command line: the list of commands, and the exit code of every error."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from trimtab import __version__
from trimtab.commands import (
    answer,
    bench,
    chat,
    check,
    combine,
    compare,
    convert,
    doctor,
    eval,
    init,
    merge,
    methods,
    push,
    report,
    runs,
    show,
    track,
    train,
    verify,
)
from trimtab.commands._parser import Parser
from trimtab.core import interrupts, process, streams
from trimtab.core.errors import StorageError, TrimtabError

COMMANDS = (
    init,
    convert,
    train,
    check,
    eval,
    chat,
    answer,
    merge,
    push,
    combine,
    methods,
    bench,
    verify,
    doctor,
    show,
    report,
    runs,
    compare,
    track,
)
"""In the order of the help."""
INTERRUPTED = 130


def main(words: Sequence[str] | None = None, parser: Callable[[], argparse.ArgumentParser] | None = None) -> int:
    """Run a command; returns its exit code (see core/errors.py).

    Args:
        parser: Makes the parser of another program, with `run` and `debug`, whose errors are handled in the same way.
    """
    streams.configure()
    with interrupts.signals_as_keyboard_interrupt(ignored_afterwards=words is None) as came:
        try:
            return _run((parser or _parser)().parse_args(words))
        except KeyboardInterrupt:  # another one, while the first was handled
            return INTERRUPTED
        except Exception:
            if not came():
                raise
            return _fail("interrupted.", INTERRUPTED)  # what it came in the middle of raised something else: an import, say


def _run(arguments: argparse.Namespace) -> int:
    os.environ.update(process.environment())  # before a command imports torch
    try:
        exit_code = arguments.run(arguments)
        sys.stdout.flush()
        return exit_code or 0
    except TrimtabError as error:
        if arguments.debug:
            raise
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt as error:
        return _fail(f"interrupted{f': {error}' if str(error) else ''}.", INTERRUPTED)
    except BrokenPipeError:  # the reader of our output left, as `head` does
        _close_output()
    except OSError as error:  # core/files.py says what its own were about
        if arguments.debug:
            raise
        _close_output()
        return _fail(f"{error.filename or 'standard output'}: {error.strerror or error}.", StorageError.exit_code)
    return 0


def _fail(message: str, exit_code: int) -> int:
    streams.write_stderr(message)
    return exit_code


def _close_output() -> None:
    """Let what is still to be written out go nowhere: Python would complain of it at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="trimtab",
        description="Fine-tune a language model by training a small adapter, measure the improvement and export the result.",
        epilog="Start with: trimtab train RECIPE.yaml. `trimtab COMMAND --help` explains a command.",
    )
    parser.add_argument("--version", action="version", version=f"trimtab {__version__}")
    choices = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        name = command.__name__.rpartition(".")[2]
        sentence = f"{command.HELP[0].upper()}{command.HELP[1:]}. {command.DESCRIPTION}".strip()
        added = choices.add_parser(name, help=command.HELP, description=sentence)
        added.add_argument("--debug", action="store_true", help="show the traceback of an error")
        added.set_defaults(run=command.run)
        command.add_arguments(added)
    return parser
