"""`trimtab doctor`: whether every method works with the library versions that are installed, and what computes on which device."""

import argparse
import warnings
from collections.abc import Iterable
from itertools import groupby
from typing import Any

from trimtab.commands._parser import add_json
from trimtab.commands._terminal import print_json, terminal
from trimtab.core.errors import UnsupportedModel
from trimtab.core.process import gc_frozen

HELP = "test every method with the installed library versions, in under a minute"
DESCRIPTION = (
    "Packing, gradients, decoding, saving, loading and merging are tested on a small random model. Then it says by what layers are "
    "computed on the CPU and the accelerator, and what is wrong with what is not used."
)
add_arguments = add_json


def run(arguments: argparse.Namespace) -> None:
    from rich.markup import escape

    with gc_frozen():
        from trimtab.certify.doctor import TRIALS, run_trials, ways
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # what probes found is said below
        found = ways()
    if arguments.json:
        failures, used = ([each._asdict() for each in these] for these in (failed, found))
        print_json({"versions": versions(), "tried": count, "failed": failures, "ways": used})
    else:
        for line in _lines(found):
            console.print(f"[dim]{escape(line)}[/]")
        console.print(f"[dim]{count} trials with {escape(', '.join(f'{k} {v}' for k, v in versions().items()))}[/]")
    if failed:
        methods = ", ".join(dict.fromkeys(trial.method for trial in failed))
        raise UnsupportedModel(
            f"{len(failed)} of {count} trials fail with these versions, of {methods}: do not train with them. Install the versions in "
            "constraints.txt, or report it."
        )


def _lines(ways: Iterable[Any]) -> list[str]:
    """What computes, a line for each device and number type, and a line for each problem."""
    lines = []
    for (device, dtype), group in groupby(ways, key=lambda way: (way.device, way.dtype)):
        of_type = list(group)
        by = {way.by: ", ".join(other.operation for other in of_type if other.by == way.by) for way in of_type}
        lines.append(f"{device} {dtype}: " + "; ".join(f"{operations}: {name}" for name, operations in by.items()))
        lines += [f"  {problem}" for problem in dict.fromkeys(way.problem for way in of_type) if problem]
    return lines
