"""The adapter methods as a table: what each would train on a model; and of one method, the modules that it would adapt."""

from typing import Any

import torch
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from trimtab.core.errors import TrimtabError
from trimtab.methods import Method, attach_uninitialized, base_modules
from trimtab.objectives import Objective


def methods_facts(model: Any) -> list[dict[str, Any]]:
    """Each method with its default hyperparameters on this model, as JSON data.

    `parameters` is by the method's closed formula; where the method cannot be used on the model, `refused` says why.
    """
    facts = []
    for name in Method.names():
        kind = Method.member(name)
        parameters, positions, refused = None, 0, None
        try:
            method = kind()
            parameters, positions = method.parameter_count(model), method.virtual_token_count
        except TrimtabError as error:
            refused = str(error)
        facts.append(
            {
                "name": name,
                "summary": (kind.__doc__ or "").strip().splitlines()[0],
                "parameters": parameters,
                "refused": refused,
                "mergeable": kind.mergeable,
                "identity_at_init": kind.identity_at_init,
                "positions": positions,
                "objectives": Objective.names(),
                "peft": kind.peft_type,
            }
        )
    return facts


def methods_table(facts: list[dict[str, Any]], source: str) -> Group:
    """`methods_facts` as a table."""
    title = f"Methods with their defaults on {escape(source)}"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("method", no_wrap=True)
    table.add_column("parameters", justify="right", no_wrap=True)
    table.add_column("merges", no_wrap=True)
    table.add_column("what it does")
    for method in facts:
        parameters = f"{method['parameters']:,}" if method["parameters"] is not None else "–"
        summary = method["summary"] + (f" Unsupported on this model: {method['refused']}" if method["refused"] else "")
        if method["positions"]:
            summary += f" They take {method['positions']} positions of the context."
        table.add_row(f"[bold]{method['name']}[/]", parameters, "yes" if method["mergeable"] else "no", escape(summary))
    objectives = ", ".join(facts[0]["objectives"])
    return Group(table, Text(f"\nEach works with every objective: {objectives}.", style="dim"))


def method_facts(model: Any, method: Method) -> dict[str, Any]:
    """The modules that a method would adapt on a model, by attaching it there, as JSON data. Raises NoSuchModule or RecipeError."""
    known, frozen = base_modules(model), method.left_frozen(model)
    total = sum(p.numel() for p in model.parameters())
    with torch.device("meta"):
        adapter = attach_uninitialized(model, method.resolve_tokens(lambda _: [0]), 0, "default")
    replaced = [
        {
            "module": path,
            "kind": type(known[path]).__name__,
            "tensors": {name: list(p.shape) for name, p in layer.own_parameters().items()},
        }
        for path, layer in adapter.layers.items()
    ]
    derivation = [
        {
            "modules": one.modules,
            "count": one.count,
            "kind": one.kind,
            "shape": list(one.shape) if one.shape else None,
            "tensors": {name: list(shape) for name, shape in one.tensors.items()},
            "formula": one.formula,
            "each": one.each,
            "sum": one.sum,
            "parameters": one.parameters,
        }
        for one in adapter.replaced()
    ]
    trained = sum(p.numel() for p in adapter.parameters().values())
    line = adapter.trainable_parameters()
    adapter.detach()
    return {
        "method": method.plain(),
        "parameters": trained,
        "base_parameters": total,
        "trainable": line,
        "positions": method.virtual_token_count,
        "left_frozen": frozen,
        "derivation": derivation,
        "replaced": replaced,
    }


def method_table(facts: dict[str, Any], source: str) -> Group:
    """`method_facts` as a table, with one row for modules that differ in the number of their layer alone."""
    table = Table(box=None, pad_edge=False)
    table.add_column("module, and what is trained of each", overflow="fold")
    table.add_column("modules · each", justify="right", overflow="fold")
    for one in facts["derivation"]:
        kind = one["kind"] + (" {:,}→{:,}".format(*one["shape"]) if one["shape"] else "")
        sizes = ", ".join(f"{name} {'×'.join(map(str, shape))}" for name, shape in one["tensors"].items())
        row = Text(f"{one['modules'] or '(the whole model)'} ({kind})")
        row.append(f"\n  {sizes}: {one['formula']} = {one['each']:,}", style="dim")
        table.add_row(row, one["sum"])
    name, settings = facts["method"]["name"], {k: v for k, v in facts["method"].items() if k != "name"}
    text = ", ".join(f"{key} {value}" for key, value in settings.items() if value not in (None, False, {}, [], 0))
    sums = [f"{one['parameters']:,}" for one in facts["derivation"] if one["parameters"]]
    head = [Text(f"{name} on {source}: {text}", style="bold"), Text(facts["trainable"])]
    if facts["left_frozen"]:
        head.append(Text(f"Not adapted, frozen: {facts['left_frozen']}."))
    if facts["positions"]:
        head.append(Text(f"Its virtual tokens take {facts['positions']} positions of every example's context."))
    last = [Text(f"\n{' + '.join(sums)} = {facts['parameters']:,}")] if len(sums) > 1 else []
    return Group(*head, Text(), table, *last)
