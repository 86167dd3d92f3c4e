"""The commands that look, and prove: what would be learned, what a run has left, whether the libraries are well."""

import argparse
from datetime import datetime

from trimtab.commands._shared import doing, print_json, terminal
from trimtab.core.errors import UnsupportedModel
from trimtab.core.process import without_collector


def check(arguments: argparse.Namespace) -> None:
    from trimtab.core import yaml12

    yaml12.load_file(arguments.recipe)
    console = terminal()
    with doing(console), without_collector():
        from trimtab.core import files
        from trimtab.core.config import read
        from trimtab.data import refuse_problems
        from trimtab.deploy import versions
        from trimtab.report.checks import proof_page, proof_table, verdict
        from trimtab.run.preflight import check_disk, memory_needed, preflight, shown
        from trimtab.run.recipe import Recipe
        from trimtab.run.start import open_recipe

    recipe = read(Recipe, arguments.recipe, arguments.words)
    with doing(console) as say:
        given = open_recipe(recipe, began=say)
        say("checking what will be trained on")
        findings, rows = [*preflight(given), memory_needed(given)], shown(given.base, given.data, arguments.show)
    if arguments.html is not None:
        about = (
            str(arguments.recipe),
            given.base.source,
            f"{datetime.now():%Y-%m-%d %H:%M}",
            f"Trimtab {versions()['trimtab']}",
        )
        files.write_text(arguments.html, proof_page(findings, rows, about, recipe.to_yaml()))
    if arguments.json:
        status, words = verdict(findings)
        print_json({"status": status, "verdict": words, "findings": [one.plain() for one in findings], "rows": rows})
    else:
        console.print(proof_table(findings, rows))
    check_disk(findings)
    refuse_problems(findings)


def verify(arguments: argparse.Namespace) -> None:
    from rich.markup import escape

    from trimtab.certify.certificate import certificate_text, refuse_failed, verified

    certificate = verified(arguments.target, arguments.model)
    if arguments.json:
        print_json(certificate)
    else:
        terminal().print(escape(certificate_text(certificate).rstrip()))
    refuse_failed(certificate, arguments.target)


def doctor(arguments: argparse.Namespace) -> None:
    from rich.markup import escape

    with without_collector():
        from trimtab.certify.doctor import TRIALS, diagnoses
        from trimtab.deploy import versions

    console, sick, tried = terminal(), [], 0
    for one in diagnoses():
        tried += 1
        if one.sick:
            sick.append(one)
        if not arguments.json and one.what == list(TRIALS)[-1]:
            mine = [s for s in sick if s.method == one.method]
            console.print(f"[{'red' if mine else 'green'}]{'sick' if mine else 'well'}[/]  {one.method}")
            for s in mine:
                console.print(f"      {escape(s.what)}: {escape(s.sick)}")
    if arguments.json:
        print_json({"versions": versions(), "tried": tried, "sick": [one._asdict() for one in sick]})
    else:
        console.print(f"[dim]{tried} trials with {escape(', '.join(f'{k} {v}' for k, v in versions().items()))}[/]")
    if sick:
        methods = ", ".join(dict.fromkeys(one.method for one in sick))
        raise UnsupportedModel(
            f"{len(sick)} of {tried} trials fail with these versions, of {methods}: do not train with them. Install the versions in "
            "constraints.txt, or report it."
        )


def show(arguments: argparse.Namespace) -> None:
    from trimtab.report.tables import describe, described

    facts = described(arguments.target)
    if arguments.json:
        print_json(facts)
    else:
        terminal().print(describe(facts))
