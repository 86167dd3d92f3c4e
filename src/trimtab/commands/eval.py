"""`trimtab eval`: loss and exact match on held-out examples; of preferences, the objective's loss and measures."""

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.commands._parser import TARGET, add_model, integer
from trimtab.commands._target import open_to_compare
from trimtab.commands._terminal import print_json, terminal
from trimtab.core.errors import RecipeError

if TYPE_CHECKING:
    from trimtab.deploy import LoadedModel

HELP = "measure loss and exact match on examples that were not trained on"
DESCRIPTION = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="TARGET", help=TARGET)
    text = "how the examples of --data are read, for example data.columns.prompt=question; as the run's own unless given"
    parser.add_argument("words", metavar="key=value", nargs="*", help=text)
    parser.add_argument("--data", metavar="FILE", help="examples to evaluate on; a run's own held-out examples unless given")
    parser.add_argument("--base", action="store_true", help="evaluate the base model without the adapter as well")
    parser.add_argument("--show", metavar="N", type=integer(0), default=0, help="show N answers beside the expected ones")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    add_model(parser)


def run(arguments: argparse.Namespace) -> None:
    from trimtab.run.evaluation import examples_of_file, held_out_examples_of, kind_of_data

    folder = Path(arguments.target)
    if arguments.data is not None:
        examples, kind = examples_of_file(folder, arguments.data, arguments.words)
        source = str(arguments.data)
    elif arguments.words:
        raise RecipeError(
            f"{arguments.words[0]}: says how the examples of a file are read, and a run's own are read as they were. Name a file with --data."
        )
    else:
        (examples, source), kind = held_out_examples_of(folder), kind_of_data(folder)
    target = open_to_compare(arguments)
    evaluate = _evaluate_answers if kind == "answers" else _evaluate_preferences
    evaluate(arguments, target, examples, source)


def _evaluate_answers(arguments: argparse.Namespace, target: "LoadedModel", examples: list[Any], source: str) -> None:
    from trimtab.evaluate import score
    from trimtab.report import AnsweringBar
    from trimtab.report.scores import answers_table, scores_table
    from trimtab.run.evaluation import block_of_text

    block = block_of_text(Path(arguments.target))
    console, name, scores = terminal(), "adapter" if target.adapter else "model", {}
    with AnsweringBar(console, len(examples), quiet=arguments.json) as bar:
        if arguments.base and target.adapter is not None:
            with target.adapter.disabled():
                scores["base"] = score(target.base, examples, bar.of("base"), block)
        scores[name] = score(target.base, examples, bar.of(name), block)
    if arguments.json:
        print_json({"data": source, **scores.pop(name), **scores})
        return
    console.print(scores_table(scores, source))
    if arguments.show:
        console.print(answers_table({model: result["answers"][: arguments.show] for model, result in scores.items()}))


def _evaluate_preferences(arguments: argparse.Namespace, target: "LoadedModel", examples: list[Any], source: str) -> None:
    from trimtab.evaluate import answer_preferences
    from trimtab.evaluate.preferences import score_preferences
    from trimtab.report import AnsweringBar
    from trimtab.report.scores import compared_answers_table, preferences_table
    from trimtab.run.evaluation import objective_of

    assert target.adapter is not None, "a run has an adapter"
    scores = score_preferences(
        target.base, target.adapter, examples, *objective_of(Path(arguments.target)), with_base=arguments.base
    )
    console, shown = terminal(), examples[: arguments.show]
    if shown:
        with AnsweringBar(console, len(shown), quiet=arguments.json) as bar:
            for name in scores:
                with target.adapter.disabled() if name == "base" else nullcontext():
                    scores[name]["answers"] = answer_preferences(target.base, shown, bar.of(name))
    if arguments.json:
        print_json({"data": source, **scores.pop("adapter"), **scores})
        return
    answers = {name: result.pop("answers") for name, result in scores.items() if shown}
    console.print(preferences_table(scores, source))
    if answers:
        console.print(compared_answers_table(answers))
