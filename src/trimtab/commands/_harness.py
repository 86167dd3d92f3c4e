"""`trimtab eval --harness`: tasks of lm-evaluation-harness."""

import argparse
from contextlib import AbstractContextManager, nullcontext

from trimtab.commands._parser import integer
from trimtab.commands._target import open_to_compare
from trimtab.commands._terminal import print_json, terminal
from trimtab.core.errors import RecipeError


def add_harness(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("tasks of lm-evaluation-harness (pip install 'trimtab[harness]')")
    group.add_argument("--harness", metavar="TASKS", help="tasks, groups or YAML files of tasks, such as mmlu,hellaswag")
    group.add_argument("--fewshot", metavar="N", type=integer(0), help="examples in each prompt; as the task says unless given")
    group.add_argument("--limit", metavar="N", type=integer(1), help="the first N documents of each task alone, for a trial")
    group.add_argument("--chat", action="store_true", help="write prompts with the chat template")


def refuse_harness_options(arguments: argparse.Namespace) -> None:
    """Raise RecipeError for options that say nothing without --harness."""
    for name in ("fewshot", "limit", "chat"):
        if getattr(arguments, name) not in (None, False):
            raise RecipeError(f"--{name}: of --harness, which is not given.")


def run_harness(arguments: argparse.Namespace) -> int:
    """Raises RecipeError: the harness is not installed, has no such task, or other arguments don't apply."""
    for given, name in ((arguments.data, "--data"), (arguments.show, "--show"), (arguments.words, "key=value")):
        if given:
            raise RecipeError(f"{name}: does not apply to --harness, whose tasks have documents and settings of their own.")
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise RecipeError("--harness needs lm-evaluation-harness. Install it with: pip install 'trimtab[harness]'") from None
    from trimtab.evaluate.harness import run_tasks
    from trimtab.report import AnsweringBar
    from trimtab.report.harness import harness_table

    names = [name for name in arguments.harness.split(",") if name]
    target, console = open_to_compare(arguments), terminal()
    models: list[tuple[str, AbstractContextManager[None]]] = [("adapter" if target.adapter else "model", nullcontext())]
    if arguments.base and target.adapter is not None:
        models.insert(0, ("base", target.adapter.disabled()))
    with AnsweringBar(console, None, quiet=arguments.json) as bar:
        results = run_tasks(
            target.base, models, names, fewshot=arguments.fewshot, limit=arguments.limit, chat=arguments.chat, on_done=bar.of
        )
    if arguments.json:
        print_json(results)
    else:
        console.print(harness_table(results))
    return 0
