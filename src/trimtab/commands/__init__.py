"""What the commands do: each opens what it is given, has it done by the floors below, and prints what came of it."""

from trimtab.commands.trust import check, doctor, show, verify
from trimtab.commands.work import chat, combine, evaluate, merge, methods, train

__all__ = ["chat", "check", "combine", "doctor", "evaluate", "merge", "methods", "show", "train", "verify"]
