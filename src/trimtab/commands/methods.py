"""`trimtab methods`: the adapter methods, and what each would train on a model."""

import argparse
from pathlib import Path

from trimtab.commands._parser import MODEL, add_json
from trimtab.commands._terminal import print_json, status, terminal
from trimtab.core.errors import RecipeError
from trimtab.core.process import gc_frozen

HELP = "list the adapter methods and what each would train on a model"
DESCRIPTION = "With keys such as method.rank=8, or a recipe: the modules that this method would adapt. No weights are read."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    text = f"{MODEL}, or a recipe; and its keys"
    parser.add_argument("words", metavar="MODEL|RECIPE.yaml [key=value …]", nargs="*", help=text)
    add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    console = terminal()
    with status(console), gc_frozen():
        from trimtab.base import skeleton
        from trimtab.report.methods import method_facts, method_table, methods_facts, methods_table
        from trimtab.run.recipe import Recipe

    names = [word for word in arguments.words if "=" not in word or Path(word).exists()]
    keys = [word for word in arguments.words if word not in names]
    if len(names) > 1:
        raise RecipeError(f"methods: expected one model, got {' and '.join(names)}. Keys are given as key=value.")
    if names and names[0].endswith((".yaml", ".yml")):
        recipe = Recipe.read(Path(names[0]), keys)
    else:
        recipe = Recipe.parse({"data": {"train": "-"}, **({"model": names[0]} if names else {})}, keys)
    name = recipe.model.name
    model = skeleton(name)
    of_one = bool(keys) or recipe.data.train != ("-",)
    facts = method_facts(model, recipe.method) if of_one else {"methods": methods_facts(model)}
    if arguments.json:
        print_json({"model": name, **facts})
    else:
        console.print(method_table(facts, name) if of_one else methods_table(facts["methods"], name))
