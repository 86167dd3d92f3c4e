"""The adapter methods as a table: what each would train on a model, and what can be done with it."""

from typing import Any

from rich.markup import escape
from rich.table import Table

from trimtab.errors import TrimtabError
from trimtab.methods import Method
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
            parameters, positions = method.parameter_count(model), method.positions
        except TrimtabError as error:
            refused = str(error)
        facts.append(
            {
                "name": name,
                "summary": (kind.__doc__ or "").strip().splitlines()[0],
                "parameters": parameters,
                "refused": refused,
                "mergeable": kind.mergeable,
                "starts_as_base": kind.starts_as_base,
                "positions": positions,
                "objectives": Objective.names(),
                "peft": kind.peft_type,
            }
        )
    return facts


def methods_table(facts: list[dict[str, Any]], source: str) -> Table:
    """`methods_facts` as a table."""
    title = f"Methods, each as it is by default on {escape(source)}"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column, justify in (
        ("method", "left"), ("parameters", "right"), ("merges", "left"), ("positions", "right"), ("stages", "left"), ("", "left"),
    ):  # fmt: skip
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for one in facts:
        trains = f"{one['parameters']:,}" if one["parameters"] is not None else "–"
        table.add_row(
            f"[bold]{one['name']}[/]",
            trains,
            "yes" if one["mergeable"] else "no",
            f"{one['positions'] or '–'}",
            ", ".join(one["objectives"]),
            escape(one["refused"] or one["summary"]),
        )
    return table
