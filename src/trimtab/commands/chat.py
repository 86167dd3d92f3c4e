"""`trimtab chat`: chat with a model, or ask it one question."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.commands._parser import TARGET, add_model, integer
from trimtab.commands._target import open_to_compare
from trimtab.commands._terminal import say, terminal
from trimtab.core.errors import RecipeError
from trimtab.core.streams import replace_surrogates, write_stderr

if TYPE_CHECKING:
    from trimtab.deploy import LoadedModel

HELP = "chat with a model"
DESCRIPTION = ""
CUT_OFF = {
    "length": "the answer was cut off after {0.max_new_tokens} tokens (--max-new-tokens).",
    "context": "the answer was cut off because the model's context is full.",
}
"""What to say of an answer that did not stop at EOS."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="TARGET", help=TARGET)
    parser.add_argument("--prompt", metavar="TEXT", help="ask this one question and exit")
    parser.add_argument("--base", action="store_true", help="show the base model's answer beside the adapter's")
    parser.add_argument(
        "--system", metavar="TEXT", help="the system message; the run's data.system unless given, and none if it is empty"
    )
    parser.add_argument("--max-new-tokens", metavar="N", type=integer(1), default=512, help="default: %(default)s")
    for name, (metavar, kind, text) in SETTINGS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", metavar=metavar, type=kind, help=text)
    text = "end the answer before this text; may be given several times"
    parser.add_argument("--stop", metavar="TEXT", action="append", help=text)
    add_model(parser)


def _number(word: str) -> float:
    try:
        number = float(word)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {word!r}")
    return number


SETTINGS: dict[str, tuple[str, Any, str]] = {
    "temperature": ("T", _number, "sampling temperature; 0 (the default) is greedy decoding"),
    "top_p": ("P", _number, "sample from the most likely tokens that together have this probability"),
    "top_k": ("K", integer(0), "sample from the K most likely tokens"),
    "repetition_penalty": ("X", _number, "make tokens that have occurred less likely by this factor"),
    "seed": ("N", integer(0), "seed for sampling (default: 0)"),
}
"""Options for settings of `engine.Generation`, by name: placeholder, type, help."""


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    given = {name: getattr(arguments, name) for name in (*SETTINGS, "stop")}
    return {name: value for name, value in given.items() if value is not None}


def run(arguments: argparse.Namespace) -> None:
    from rich.markup import escape

    from trimtab.engine import Generation

    Generation(**_settings(arguments))  # refused before the model is loaded
    target = open_to_compare(arguments)
    system = _system(arguments)
    conversation: list[dict[str, str]] = [{"role": "system", "content": replace_surrogates(system)}] if system else []
    if arguments.prompt is not None:
        _answer(target, [*conversation, {"role": "user", "content": replace_surrogates(arguments.prompt)}], arguments)
        return
    console = terminal()
    name = escape(str(target.folder or target.base.source))
    console.print(f"[dim]{name}: type a message; /new starts a new conversation, /quit exits.[/]")
    start = len(conversation)
    while True:
        try:
            text = console.input("[bold]> [/]").strip()
        except EOFError:
            console.print()
            return
        if text in ("/quit", "/exit"):
            return
        if text == "/new":
            del conversation[start:]
        elif text:
            if not target.base.has_template:
                conversation.clear()  # it continues a text, and knows of no conversation
            message = {"role": "user", "content": text}
            try:
                answer = _answer(target, [*conversation, message], arguments)
            except RecipeError as error:  # such as a conversation that has become too long
                console.print(f"[yellow]{escape(str(error))}[/] [dim]/new starts a new conversation.[/]")
                continue
            conversation += [message, {"role": "assistant", "content": answer}]


def _system(arguments: argparse.Namespace) -> str | None:
    """The system message that is asked for, or that the run was trained with, which is said."""
    from trimtab.run.evaluation import system_of

    given: str | None = arguments.system
    if given is None and (own := system_of(Path(arguments.target))) is not None:
        write_stderr(f"with the run's system message (--system '' for none): {own}")
        return own
    return given


def _answer(target: "LoadedModel", conversation: list[dict[str, str]], arguments: argparse.Namespace) -> str:
    """Print the answer as it comes, the base model's first with --base; returned is the adapter's."""
    if arguments.base and target.adapter is not None:
        with target.adapter.disabled():
            _print_answer(target, conversation, arguments, "base")
        return _print_answer(target, conversation, arguments, "adapter")
    return _print_answer(target, conversation, arguments)


def _print_answer(
    target: "LoadedModel", conversation: list[dict[str, str]], arguments: argparse.Namespace, label: str = ""
) -> str:
    from trimtab.api import stream

    if label:
        say(f"[{label}] ", end="")
    pieces, answer = stream(target.base, conversation, max_new_tokens=arguments.max_new_tokens, **_settings(arguments)), ""
    while True:
        try:
            piece = next(pieces)
        except StopIteration as end:
            say("")
            if end.value in CUT_OFF:
                write_stderr(CUT_OFF[end.value].format(arguments))
            return answer
        answer += piece
        say(piece, end="")
