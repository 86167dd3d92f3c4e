"""Linear layers that `all-linear` leaves: what chooses experts or tokens gets no useful gradient, and some are not called at all."""

import ast
import inspect
import sys
import textwrap
from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import nn

from trimtab.methods._experts import routers

FACTS = {"dtype", "device", "shape", "size", "ndim", "dim"}
"""What code may read of a weight without computing with its numbers."""


def unsuited(own: Mapping[str, nn.Module]) -> dict[str, str]:
    """The paths of such layers, and of all modules in those that choose, with the reason."""
    reasons = dict.fromkeys(routers(own), "router, which chooses the experts")
    for path, module in own.items():
        parent, _, name = path.rpartition(".")
        if "indexer" in path.split("."):
            reasons[path] = "indexer, which chooses tokens and passes no gradient"
        elif isinstance(module, nn.Linear) and parent in own and name in _computed_with(*_class(own[parent])):
            reasons[path] = "the model's code computes with its weight itself"
    return reasons


def _class(module: nn.Module) -> tuple[str, str]:
    return type(module).__module__, type(module).__name__


def _code(module: str, kind: str) -> Any:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(getattr(sys.modules[module], kind))))
    except (OSError, TypeError, AttributeError, KeyError, SyntaxError):  # a class without a file
        return ast.parse("")


def asks_kind(parent: nn.Module, name: str) -> bool:
    """Whether a module's code asks of which class one in it is, and so would take an adapter layer around that for another one."""
    return name in _asked_kinds(*_class(parent))


@cache
def _asked_kinds(module: str, kind: str) -> set[str]:
    asked = {
        node.args[0].attr
        for node in ast.walk(_code(module, kind))
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", None) == "isinstance"
        and isinstance(node.args[0], ast.Attribute)
    }
    return {str(name) for name in asked}


@cache
def _computed_with(module: str, kind: str) -> set[str]:
    """The attributes whose weight a class's code multiplies by itself, or reads without ever calling them."""
    tree = _code(module, kind)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    called, read, multiplied = set(), set(), set()
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"):
            continue
        use = parents.get(node)
        if isinstance(use, ast.Call) and use.func is node:
            called.add(node.attr)
        if isinstance(use, ast.Attribute) and use.attr == "weight":
            further = parents.get(use)
            if isinstance(further, ast.BinOp):
                multiplied.add(node.attr)
            elif not (isinstance(further, ast.Attribute) and further.attr in FACTS):
                read.add(node.attr)
    return multiplied | (read - called)
