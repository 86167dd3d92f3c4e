"""The words of a command: keys of the recipe wherever they stand, and what to write instead of a word that is not known."""

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from trimtab.core.synonyms import elsewhere, hint, option


class Parser(argparse.ArgumentParser):
    """Python's, which says more of what it does not know."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Keys of the recipe may stand behind options, too; no word at all asks for help."""
        words = sys.argv[1:] if args is None else args
        if not words:
            self.print_help()
            self.exit()
        found, left = self.parse_known_args(words, namespace)
        keys = [word for word in left if "=" in word and not word.startswith("-")] if hasattr(found, "words") else []
        if len(keys) < len(left):
            self.error(f"unrecognized arguments: {' '.join(word for word in left if word not in keys)}")
        if keys:
            found.words = [*found.words, *keys]
        return found

    def error(self, message: str) -> NoReturn:
        super().error(message + self._advice(message))

    def _advice(self, message: str) -> str:
        if choice := re.match(r"argument COMMAND: invalid choice: '(.*?)'", message):
            known = re.findall(r"'?([\w-]+)'?", message.partition("choose from")[2])
            return hint(choice[1], known, lambda *_: None).partition(" Known")[0].rstrip(".")
        words = message.removeprefix("unrecognized arguments: ").split() if message.startswith("unrecognized") else []
        for word, after in zip(words, [*words[1:], ""], strict=False):
            if word.startswith("-") and (key := option(word)):
                key = key.replace("…", after) if after and not after.startswith("-") else key
                return f". Keys of the recipe are given as words: {key}"
            if word.startswith("-") and (said := elsewhere(word.lstrip("-").partition("=")[0])):
                return f". {word}: {said}"
        return ""
