"""The adapter methods as a table: what each would train on a model; and of one method, the modules that it would adapt."""

import re
from itertools import groupby
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
    trained = sum(p.numel() for p in adapter.parameters().values())
    adapter.detach()
    return {
        "method": method.plain(),
        "parameters": trained,
        "base_parameters": total,
        "positions": method.virtual_token_count,
        "left_frozen": frozen,
        "replaced": replaced,
    }


def method_table(facts: dict[str, Any], source: str) -> Group:
    """`method_facts` as a table, with one row for modules that differ in the number of their layer alone."""
    table = Table(box=None, pad_edge=False)
    table.add_column("module", overflow="fold")
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("of", no_wrap=True)
    table.add_column("trained", overflow="fold")

    alike: dict[tuple[str, str, str], list[list[int]]] = {}
    for module in facts["replaced"]:
        sizes = ", ".join(f"{name} {'×'.join(map(str, shape))}" for name, shape in module["tensors"].items())
        numbers = [int(part) for part in module["module"].split(".") if part.isdigit()]
        pattern = re.sub(r"(?<![^.])\d+(?![^.])", "{}", module["module"])
        alike.setdefault((pattern, module["kind"], sizes), []).append(numbers)
    for (pattern, kind, sizes), layers in alike.items():
        spans = [_span(sorted(set(column))) for column in zip(*layers, strict=True)]
        table.add_row(escape(pattern.format(*spans)) or "(the whole model)", f"{len(layers):,} ×", kind, sizes)
    name, settings = facts["method"]["name"], {k: v for k, v in facts["method"].items() if k != "name"}
    text = ", ".join(f"{key} {value}" for key, value in settings.items() if value not in (None, False, {}, [], 0))
    share = facts["parameters"] / facts["base_parameters"]
    head = [
        Text(f"{name} on {source}: {text}", style="bold"),
        Text(f"{facts['parameters']:,} parameters are trained ({share:.2%})."),
    ]
    if facts["left_frozen"]:
        head.append(Text(f"Not adapted, frozen: {facts['left_frozen']}."))
    if facts["positions"]:
        head.append(Text(f"Its virtual tokens take {facts['positions']} positions of every example's context."))
    return Group(*head, Text(), table)


def _span(numbers: list[int]) -> str:
    """0, 1, 2, 3, 7 as [0-3,7]."""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    spans = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return spans[0] if len(numbers) == 1 else f"[{','.join(spans)}]"
