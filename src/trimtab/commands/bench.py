"""`trimtab bench`: the same training in Trimtab and in its peers."""

import argparse
import sys
from pathlib import Path
from typing import Any

from trimtab.commands._parser import MODEL, integer
from trimtab.commands._terminal import print_json, terminal

HELP = "train on the same examples in Trimtab and in its peers, in turns, and compare speed, memory and losses"
DESCRIPTION = "The peers (PEFT, TRL) may be installed in another environment."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", metavar="FILE", help="rows to train on; made-up ones of chat-like lengths unless given")
    parser.add_argument("--model", metavar="NAME", default="smollm2-135m-instruct", help=MODEL)
    parser.add_argument("--rows", metavar="N", type=integer(1), default=64)
    parser.add_argument("--rows-per-step", metavar="N", type=integer(1), default=8)
    parser.add_argument("--rank", metavar="N", type=integer(1), default=8, help="of the LoRA that is trained")
    parser.add_argument("--targets", metavar="NAME", nargs="+", default=["all-linear"], help="the matrices that it adapts")
    parser.add_argument("--objective", choices=("sft", "dpo", "kto"), default="sft", help="what is learned (default: sft)")
    parser.add_argument("--pairs", metavar="N", type=integer(1), default=3, help="how often each trainer runs")
    parser.add_argument(
        "--against", metavar="PEER", nargs="+",
        help="hf-peft, hf-peft-no-recompute, hf-peft-grouped, trl, trl-no-recompute (default: the first three; of dpo and kto, trl)",
    )  # fmt: skip
    parser.add_argument("--python", metavar="PATH", default=sys.executable, help="the Python interpreter that has the peers")
    parser.add_argument("--output", metavar="FOLDER", type=Path, help="a new folder for results.json and a chart")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")


def run(arguments: argparse.Namespace) -> None:
    from trimtab.bench import Asked, compare
    from trimtab.core import files
    from trimtab.report.comparison import comparison_chart, comparison_table

    if arguments.output is not None:
        files.refuse_existing(arguments.output)
    words = ("data", "model", "rows", "rows_per_step", "rank", "objective", "pairs", "python")
    asked = Asked(
        **{word: getattr(arguments, word) for word in words},
        targets=tuple(arguments.targets),
        against=tuple(arguments.against or (Asked.against if arguments.objective == "sft" else ("trl",))),
    )
    console = terminal()

    def say(name: str, result: dict[str, Any]) -> None:
        if not arguments.json:
            floor = result["gemm_floor_fraction"]
            share = f"{floor:4.0%} of the floor" if floor is not None else f"{result['rows_per_min']:.1f} rows/min"
            console.print(
                f"[dim]round {result['round']}[/] {name:22} {result['tokens_per_s']:7.1f} tokens/s  peak {result['peak_gb']:5.2f} GB  "
                f"{share}  [dim]{result['gemm_rate'] / 1e9:,.0f} GFLOP/s, load {result['load']:.1f}[/]"
            )

    results = compare(asked, say)
    data = Path(asked.data).name if asked.data else "made-up rows"
    title = f"{data}: {asked.rows} rows, {asked.objective}, LoRA of rank {asked.rank} on {', '.join(asked.targets)}"
    if arguments.json:
        print_json(results)
    else:
        console.print(comparison_table(results, title))
    if arguments.output is not None:
        with files.new_folder(arguments.output) as folder:
            files.write_json(folder / "results.json", results)
            files.write_text(folder / "chart.svg", comparison_chart(results, title))
