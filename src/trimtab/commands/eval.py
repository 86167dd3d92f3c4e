"""`trimtab eval`: loss and metrics on held-out examples; of preferences, the objective's loss and measures."""

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.commands._harness import add_harness, refuse_harness_options, run_harness
from trimtab.commands._parser import TARGET, add_model, integer
from trimtab.commands._target import open_to_compare
from trimtab.commands._terminal import print_json, terminal
from trimtab.core.errors import RecipeError
from trimtab.core.streams import write_stderr

if TYPE_CHECKING:
    from trimtab.evaluate import EvalConfig

HELP = "measure loss and metrics on examples that were not trained on"
DESCRIPTION = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="TARGET", help=TARGET)
    text = (
        "how answers are generated and measured, for example eval.temperature=0.7 eval.metrics=[rouge]; and how the examples of --data "
        "are read, for example data.columns.prompt=question; as the run's own unless given"
    )
    parser.add_argument("words", metavar="key=value", nargs="*", help=text)
    parser.add_argument("--data", metavar="FILE", help="examples to evaluate on; a run's own held-out examples unless given")
    parser.add_argument("--base", action="store_true", help="evaluate the base model without the adapter as well, and compare")
    parser.add_argument("--show", metavar="N", type=integer(0), default=0, help="show N answers beside the expected ones")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    add_model(parser)
    add_harness(parser)


def run(arguments: argparse.Namespace) -> int:
    return run_harness(arguments) if arguments.harness is not None else _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    refuse_harness_options(arguments)
    from trimtab.run.evaluation import answering_of, examples_of_file, held_out_examples_of, kind_of_data, split_words

    folder, (reading, answering) = Path(arguments.target), split_words(arguments.words)
    config = answering_of(folder, answering, write_stderr)
    if arguments.show and not config.asks_for_answers:
        raise RecipeError("--show: with eval.metrics=[], no answers are generated.")
    if arguments.data is not None:
        examples, kind = examples_of_file(folder, arguments.data, reading)
        source = str(arguments.data)
    elif reading:
        raise RecipeError(
            f"{reading[0]}: says how the examples of a file are read, and a run's own are read as they were. Name a file with --data."
        )
    else:
        (examples, source), kind = held_out_examples_of(folder), kind_of_data(folder)
    evaluate = _evaluate_answers if kind == "answers" else _evaluate_preferences
    if kind != "answers" and (measuring := [w for w in answering if w.startswith(("eval.metrics", "eval.function"))]):
        raise RecipeError(
            f"{measuring[0]}: preferences are measured by their objective. For metrics, name a file of prompts and completions with --data."
        )
    return evaluate(arguments, config, examples, source)


def _evaluate_answers(arguments: argparse.Namespace, config: "EvalConfig", examples: list[Any], source: str) -> int:
    from trimtab.data import Conversation
    from trimtab.evaluate import Exam, UserFunction, evaluate, evaluation_rows
    from trimtab.report import AnsweringBar
    from trimtab.report.scores import answers_table, scores_table
    from trimtab.run.evaluation import block_of_text

    function = UserFunction(config.function, write_stderr) if config.function is not None else None
    target = open_to_compare(arguments)
    console, name, scores = terminal(), "adapter" if target.adapter else "model", {}
    rows = evaluation_rows(target.base, examples, block_of_text(Path(arguments.target)))
    exam = Exam(target.base, [example for example in examples if isinstance(example, Conversation)], config, function)
    for note in exam.notes:
        write_stderr(note)
    with AnsweringBar(console, len(exam.asked), quiet=arguments.json) as bar:
        if arguments.base and target.adapter is not None:
            with target.adapter.disabled():
                scores["base"] = evaluate(target.base, rows, exam, bar.of("base"))
        scores[name] = evaluate(target.base, rows, exam, bar.of(name))
    difference = scores[name].minus(scores["base"]) if "base" in scores else {}
    plain = {model: found.plain() for model, found in scores.items()}
    if arguments.json:
        more = {"base": plain["base"], "difference": difference} if difference else {}
        print_json({"data": source, "eval": config.plain(), **plain[name], **more})
    else:
        console.print(scores_table(plain, source, difference))
        if arguments.show:
            console.print(answers_table({model: found["answers"][: arguments.show] for model, found in plain.items()}))
    return _report_failures(plain)


def _report_failures(scores: dict[str, dict[str, Any]]) -> int:
    """Say what the user's function failed on, now that everything else has been shown; returned is the exit code."""
    failures = dict.fromkeys(found["function_error"] for found in scores.values() if "function_error" in found)
    for failure in failures:
        write_stderr(failure)
    return RecipeError.exit_code if failures else 0


def _evaluate_preferences(arguments: argparse.Namespace, config: "EvalConfig", examples: list[Any], source: str) -> int:
    from trimtab.evaluate import answer_preferences
    from trimtab.evaluate.preferences import score_preferences
    from trimtab.report import AnsweringBar
    from trimtab.report.scores import compared_answers_table, preferences_table
    from trimtab.run.evaluation import objective_of

    target = open_to_compare(arguments)
    assert target.adapter is not None, "a run has an adapter"
    scores = score_preferences(
        target.base, target.adapter, examples, *objective_of(Path(arguments.target)), with_base=arguments.base
    )
    console, shown = terminal(), examples[: arguments.show]
    if shown:
        with AnsweringBar(console, len(shown), quiet=arguments.json) as bar:
            for name in scores:
                with target.adapter.disabled() if name == "base" else nullcontext():
                    scores[name]["answers"] = answer_preferences(target.base, shown, config, bar.of(name))
    if arguments.json:
        print_json({"data": source, **scores.pop("adapter"), **scores})
        return 0
    answers = {name: result.pop("answers") for name, result in scores.items() if shown}
    console.print(preferences_table(scores, source))
    if answers:
        console.print(compared_answers_table(answers))
    return 0
