"""The commands that make something: train, measure, talk, hand over."""

import argparse
import shlex
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.commands._shared import doing, print_json, say, terminal
from trimtab.core.errors import RecipeError, TrimtabError
from trimtab.core.process import without_collector
from trimtab.core.streams import complain, typed

if TYPE_CHECKING:
    from trimtab.deploy import Target


def train(arguments: argparse.Namespace) -> None:
    from rich.markup import escape

    from trimtab.core import yaml12

    yaml12.load_file(arguments.recipe)  # which need not wait for what follows
    console = terminal(lasting=True)
    with doing(console), without_collector():
        from trimtab.core.config import read
        from trimtab.report import Terminal
        from trimtab.run.recipe import Recipe
        from trimtab.run.script import run_recipe

    recipe = read(Recipe, arguments.recipe, arguments.words)
    try:
        with Terminal(console) as watch:
            run_recipe(recipe, watch)
    except TrimtabError as error:
        if error.free is None:
            raise
        raise type(error)(f"{error} The command for that:\n  {_into(error.free, arguments)}") from None
    folder = escape(shlex.quote(str(recipe.output)))
    console.print(f"[dim]Talk to it:[/]     trimtab chat {folder}\n[dim]Look inside:[/]    trimtab show {folder}")


def _into(folder: Path, arguments: argparse.Namespace) -> str:
    """The same command, which trains into another folder."""
    from trimtab.core.config import word

    others = [one for one in arguments.words if not one.startswith("output=")]
    return shlex.join(["trimtab", "train", str(arguments.recipe), *others, word("output", str(folder))])


def evaluate(arguments: argparse.Namespace) -> None:
    from trimtab.evaluate import score
    from trimtab.report import Answering
    from trimtab.report.tables import answers_table, scores_table
    from trimtab.run.evaluation import held_out, learned_from, rows_to_measure

    folder = Path(arguments.target)
    if arguments.data is not None:
        examples, kind = rows_to_measure(folder, arguments.data, arguments.words)
        source = arguments.data
    elif arguments.words:
        raise RecipeError(
            f"{arguments.words[0]}: says how rows are read, and a run's own are read as they were. Give others with --data."
        )
    else:
        (examples, source), kind = held_out(folder), learned_from(folder)
    target = _to_compare(arguments)
    if kind != "answers":
        _evaluate_preferences(arguments, target, examples, str(source))
        return
    console, name, scores = terminal(), "adapter" if target.adapter else "model", {}
    with Answering(console, len(examples), quiet=arguments.json) as answering:
        if arguments.base and target.adapter is not None:
            with target.adapter.disabled():
                scores["base"] = score(target.base, examples, answering.of("base"))
        scores[name] = score(target.base, examples, answering.of(name))
    if arguments.json:
        print_json({"data": str(source), **scores.pop(name), **scores})
        return
    console.print(scores_table(scores, str(source)))
    if arguments.show:
        console.print(answers_table({name: one["answers"][: arguments.show] for name, one in scores.items()}))


def _evaluate_preferences(arguments: argparse.Namespace, target: "Target", examples: list[Any], source: str) -> None:
    from trimtab.evaluate import answer_preferences
    from trimtab.evaluate.preferences import score_preferences
    from trimtab.report import Answering
    from trimtab.report.tables import beside_table, preferences_table
    from trimtab.run.evaluation import objective_of

    assert target.adapter is not None, "a run has an adapter"
    scores = score_preferences(
        target.base, target.adapter, examples, *objective_of(Path(arguments.target)), with_base=arguments.base
    )
    console, shown = terminal(), examples[: arguments.show]
    if shown:
        with Answering(console, len(shown), quiet=arguments.json) as answering:
            for name in scores:
                with target.adapter.disabled() if name == "base" else nullcontext():
                    scores[name]["answers"] = answer_preferences(target.base, shown, answering.of(name))
    if arguments.json:
        print_json({"data": source, **scores.pop("adapter"), **scores})
        return
    answers = {name: one.pop("answers") for name, one in scores.items() if shown}
    console.print(preferences_table(scores, source))
    if answers:
        console.print(beside_table(answers))


def _open(arguments: argparse.Namespace, *, certified: bool = False) -> "Target":
    with without_collector():
        from trimtab.deploy import open_target

    target = open_target(arguments.target, arguments.model, certified=certified)
    for note in target.notes:
        complain(note)  # standard output may be JSON, or an answer
    return target


def _to_compare(arguments: argparse.Namespace) -> "Target":
    target = _open(arguments)
    if arguments.base and target.adapter is None:
        raise RecipeError(f"--base: {arguments.target} is a model without an adapter, so there is nothing to compare.")
    return target


def chat(arguments: argparse.Namespace) -> None:
    from rich.markup import escape

    target = _to_compare(arguments)
    talk: list[dict[str, str]] = [{"role": "system", "content": typed(arguments.system)}] if arguments.system else []
    if arguments.prompt is not None:
        _reply(target, [*talk, {"role": "user", "content": typed(arguments.prompt)}], arguments)
        return
    console = terminal()
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
            asked = {"role": "user", "content": words}
            try:
                talk += [asked, {"role": "assistant", "content": _reply(target, [*talk, asked], arguments)}]
            except RecipeError as error:  # such as a conversation that has become too long
                console.print(f"[yellow]{escape(str(error))}[/] [dim]/new starts afresh.[/]")


CUT_OFF = {
    "length": "the answer was cut off after {0.max_new_tokens} tokens (--max-new-tokens).",
    "context": "the answer was cut off because the model's context is full.",
}
"""What to say of an answer that did not end by itself."""


def _reply(target: "Target", talk: list[dict[str, str]], arguments: argparse.Namespace) -> str:
    from trimtab.api import stream

    def reply(label: str) -> str:
        if label:
            say(f"[{label}] ", end="")
        how = {"max_new_tokens": arguments.max_new_tokens, "temperature": arguments.temperature, "seed": arguments.seed}
        pieces, said = stream(target.base, talk, **how), ""
        try:
            while True:
                piece = next(pieces)
                said += piece
                say(piece, end="")
        except StopIteration as end:
            say("")
            if end.value in CUT_OFF:
                complain(CUT_OFF[end.value].format(arguments))
        return said

    if arguments.base and target.adapter is not None:
        with target.adapter.disabled():
            reply("base")
        return reply("adapter")
    return reply("")


def merge(arguments: argparse.Namespace) -> None:
    import torch
    from rich.markup import escape

    from trimtab.core import files
    from trimtab.deploy import WELL_KEPT, merge

    files.refuse_existing(arguments.output)
    target = _open(arguments, certified=not arguments.force)
    if target.adapter is None:
        raise RecipeError(f"{arguments.target} is a model without an adapter: there is nothing to merge.")
    done = merge(target.base, target.adapter, arguments.output, dtype=getattr(torch, arguments.dtype))
    terminal().print(
        f"Merged {done.matrices} matrices into {escape(str(arguments.output))} ({arguments.dtype}). Loaded again by Transformers, its logits "
        f"differ from the adapter's by at most {done.max_logit_difference:.2g} (largest logit {done.logit_scale:.3g}); "
        f"likeliest token the same at {done.same_choice:.1%}."
    )
    if done.kept < WELL_KEPT:
        terminal().print(
            f"[yellow]Rounding to {arguments.dtype} leaves {done.kept:.1%} of the adapter's change.[/] Merge in float32, or use the adapter "
            "beside its base, where that is too little."
        )
    elif arguments.dtype != "float32":
        terminal().print(f"Rounding to {arguments.dtype} leaves {done.kept:.1%} of the adapter's change.")


def combine(arguments: argparse.Namespace) -> None:
    from rich.markup import escape

    from trimtab.core import files
    from trimtab.deploy import combine_adapters

    files.refuse_existing(arguments.output)
    how = {"rank": arguments.rank, "model": arguments.model, "certified": not arguments.force}
    done = combine_adapters(arguments.parts, arguments.output, **how)
    exact = "exactly their weighted sum" if done.error == 0 else f"their weighted sum but for {done.error:.2%} of it"
    terminal().print(f"{escape(str(arguments.output))} is {exact}: {done.adapter.method.name}, rank {done.rank}.")


def methods(arguments: argparse.Namespace) -> None:
    console = terminal()
    with doing(console), without_collector():
        from trimtab.base import skeleton
        from trimtab.core.config import made, read
        from trimtab.report.methods import method_facts, method_table, methods_facts, methods_table
        from trimtab.run.recipe import Recipe

    names = [word for word in arguments.words if "=" not in word or Path(word).exists()]
    keys = [word for word in arguments.words if word not in names]
    if len(names) > 1:
        raise RecipeError(f"methods: expected one model, got {' and '.join(names)}. Keys are given as key=value.")
    if names and names[0].endswith((".yaml", ".yml")):
        recipe = read(Recipe, Path(names[0]), keys)
    else:
        recipe = made(Recipe, {"data": {"train": "-"}, **({"model": names[0]} if names else {})}, keys)
    name = recipe.model.name
    model = skeleton(name)
    one = bool(keys) or recipe.data.train != ("-",)
    facts = method_facts(model, recipe.method) if one else {"methods": methods_facts(model)}
    if arguments.json:
        print_json({"model": name, **facts})
    else:
        console.print(method_table(facts, name) if one else methods_table(facts["methods"], name))
