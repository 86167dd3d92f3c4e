"""Other tools' files as recipes: one file a tool, and what becomes of each of its settings."""

from trimtab.migrate._account import account
from trimtab.migrate._convert import TOOLS, Conversion, convert, options_of
from trimtab.migrate._settings import Outcome, Setting

__all__ = ["TOOLS", "Conversion", "Outcome", "Setting", "account", "convert", "options_of"]
