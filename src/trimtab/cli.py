"""The command line: the list of commands, and the exit code of every error."""

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

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
from trimtab.core.errors import RecipeError, StorageError, TrimtabError
from trimtab.core.interrupts import INTERRUPTED
from trimtab.core.processes import processes
from trimtab.launch import End, one_process_notice, run_together

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
TOGETHER = (train, check, eval)
"""What several processes do together."""
SHARED = [command.run for command in TOGETHER]


def main(words: Sequence[str] | None = None, parser: Callable[[], argparse.ArgumentParser] | None = None) -> int:
    """Run a command; returns its exit code (see core/errors.py).

    Args:
        parser: Makes the parser of another program, with `run` and `debug`, whose errors are handled in the same way.
    """
    streams.configure()
    with interrupts.signals_as_keyboard_interrupt(ignored_afterwards=words is None) as came:
        try:
            if processes.started > 1 and parser is None:
                return _run_together(words)
            return _run(_parsed(parser or _parser, words))
        except KeyboardInterrupt:  # another one, while the first was handled
            return INTERRUPTED
        except Exception:
            if not came():
                raise
            return _fail("interrupted.", INTERRUPTED)  # what it came in the middle of raised something else: an import, say


def _run(arguments: argparse.Namespace) -> int:
    os.environ.update(process.environment())  # before a command imports torch
    if arguments.run in SHARED and (notice := one_process_notice()):
        streams.write_stderr(notice)
    try:
        return _carry_out(arguments)
    except (Exception, KeyboardInterrupt) as error:
        end = _end(error)
        if end is None or (arguments.debug and not isinstance(error, KeyboardInterrupt | BrokenPipeError)):
            raise
        return _fail(end.text, end.code) if end.text else end.code


def _parsed(parser: Callable[[], argparse.ArgumentParser], words: Sequence[str] | None) -> argparse.Namespace:
    """The command, and its words as they were given."""
    arguments = parser().parse_args(words)
    arguments.command_line = list(sys.argv[1:] if words is None else words)
    return arguments


def _carry_out(arguments: argparse.Namespace) -> int:
    exit_code = arguments.run(arguments)
    sys.stdout.flush()
    return exit_code or 0


def _run_together(words: Sequence[str] | None) -> int:
    """What each of several processes does; they connect for a command of several alone."""
    shown, usage = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(usage):
            arguments = _parsed(_parser, words)
    except SystemExit as error:
        if processes.rank == 0:
            sys.stdout.write(shown.getvalue())
            sys.stderr.write(usage.getvalue())
        return int(error.code or 0)
    if arguments.run in SHARED:
        os.environ.update(process.environment())
        return run_together(lambda: _carry_out(arguments), _end)
    message = (
        f"{processes.started} processes have been started, and this command is the work of one: start it without a launcher. "
        f"Several processes carry out {', '.join(map(_name, TOGETHER))}."
    )
    return _fail(message, RecipeError.exit_code) if processes.rank == 0 else RecipeError.exit_code


def _end(error: BaseException) -> End | None:
    """The exit code of an error, and what is said of it; None of one that is Trimtab's own fault."""
    if isinstance(error, TrimtabError):
        return End(error.exit_code, str(error))
    if isinstance(error, KeyboardInterrupt):
        return End(INTERRUPTED, f"interrupted{f': {error}' if str(error) else ''}.")
    if isinstance(error, BrokenPipeError):  # the reader of our output left, as `head` does
        _close_output()
        return End(0)
    if isinstance(error, OSError):  # core/files.py says what its own were about
        _close_output()
        return End(StorageError.exit_code, f"{error.filename or 'standard output'}: {error.strerror or error}.")
    return None


def _fail(message: str, exit_code: int) -> int:
    streams.write_stderr(message)
    return exit_code


def _close_output() -> None:
    """Let what is still to be written out go nowhere: Python would complain of it at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _name(command: ModuleType) -> str:
    return command.__name__.rpartition(".")[2]


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="trimtab",
        description="Fine-tune a language model by training a small adapter, measure the improvement and export the result.",
        epilog="Start with: trimtab train RECIPE.yaml. `trimtab COMMAND --help` explains a command.",
    )
    parser.add_argument("--version", action="version", version=f"trimtab {__version__}")
    parser.add_argument(
        "--local_rank", "--local-rank", help=argparse.SUPPRESS
    )  # DeepSpeed's launcher gives it; it is in the environment, too
    choices = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        name = _name(command)
        sentence = f"{command.HELP[0].upper()}{command.HELP[1:]}. {command.DESCRIPTION}".strip()
        added = choices.add_parser(name, help=command.HELP, description=sentence)
        added.add_argument("--debug", action="store_true", help="show the traceback of an error")
        added.set_defaults(run=command.run)
        command.add_arguments(added)
    return parser
