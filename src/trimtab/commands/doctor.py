"""`trimtab doctor`: whether every method works with the library versions that are installed."""

import argparse

from trimtab.commands._parser import add_json
from trimtab.commands._terminal import print_json, terminal
from trimtab.core.errors import UnsupportedModel
from trimtab.core.process import gc_frozen

HELP = "test every method with the installed library versions, in under a minute"
DESCRIPTION = "Packing, gradients, decoding, saving, loading and merging are tested on a small random model."
add_arguments = add_json


def run(arguments: argparse.Namespace) -> None:
    from rich.markup import escape

    with gc_frozen():
        from trimtab.certify.doctor import TRIALS, run_trials
        from trimtab.deploy import versions

    console, failed, count = terminal(), [], 0
    for trial in run_trials():
        count += 1
        if trial.problem:
            failed.append(trial)
        if not arguments.json and trial.name == list(TRIALS)[-1]:
            problems = [other for other in failed if other.method == trial.method]
            console.print(f"[{'red' if problems else 'green'}]{'failed' if problems else 'ok'}[/]  {trial.method}")
            for problem in problems:
                console.print(f"      {escape(problem.name)}: {escape(problem.problem)}")
    if arguments.json:
        print_json({"versions": versions(), "tried": count, "failed": [trial._asdict() for trial in failed]})
    else:
        console.print(f"[dim]{count} trials with {escape(', '.join(f'{k} {v}' for k, v in versions().items()))}[/]")
    if failed:
        methods = ", ".join(dict.fromkeys(trial.method for trial in failed))
        raise UnsupportedModel(
            f"{len(failed)} of {count} trials fail with these versions, of {methods}: do not train with them. Install the versions in "
            "constraints.txt, or report it."
        )
