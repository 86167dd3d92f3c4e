"""How a command line is read: keys of the recipe wherever they stand, and the right word for one that is not known."""

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from trimtab.core.synonyms import key_for_option, suggest, translate_key

MODEL = "a folder, a GGUF file, a hub name, or smollm2-135m-instruct"
TARGET = "a run folder, an adapter (folder or hub name), or a model (folder, GGUF file, hub name, smollm2-135m-instruct)"


class Parser(argparse.ArgumentParser):
    """argparse's, with advice on what it does not know."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Keys of the recipe may stand behind options, too; an empty command line asks for help."""
        words = sys.argv[1:] if args is None else args
        if not words:
            self.print_help()
            self.exit()
        parsed, rest = self.parse_known_args(words, namespace)
        keys = [word for word in rest if "=" in word and not word.startswith("-")] if hasattr(parsed, "words") else []
        if len(keys) < len(rest):
            self.error(f"unrecognized arguments: {' '.join(word for word in rest if word not in keys)}")
        if keys:
            parsed.words = [*parsed.words, *keys]
        return parsed

    def error(self, message: str) -> NoReturn:
        super().error(message + self._advice(message))

    def _advice(self, message: str) -> str:
        if choice := re.match(r"argument COMMAND: invalid choice: '(.*?)'", message):
            known = re.findall(r"'?([\w-]+)'?", message.partition("choose from")[2])
            return suggest(choice[1], known, lambda *_: None).partition(" Known")[0].rstrip(".")
        words = message.removeprefix("unrecognized arguments: ").split() if message.startswith("unrecognized") else []
        for word, following in zip(words, [*words[1:], ""], strict=False):
            if word.startswith("-") and (key := key_for_option(word)):
                key = key.replace("…", following) if following and not following.startswith("-") else key
                return f". Keys of the recipe are given as words: {key}"
            if word.startswith("-") and (advice := translate_key(word.lstrip("-").partition("=")[0])):
                return f". {word}: {advice}"
        return ""


def integer(least: int, most: int = 2**32 - 1) -> Any:
    """A type for argparse: a whole number in a range."""

    def parse(word: str) -> int:
        if not word.isdecimal() or not least <= int(word) <= most:
            raise argparse.ArgumentTypeError(f"expected a whole number from {least} to {most}, got {word!r}")
        return int(word)

    return parse


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="NAME", help="the base model to load the adapter on, if it is not where the adapter says"
    )


def add_force(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="use an adapter even if its run is not certified")
