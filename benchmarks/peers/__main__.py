"""The same training in Trimtab and in its peers, alternating: speed, memory and losses compared.

    python benchmarks/peers --data train.jsonl          # or: trimtab bench --data train.jsonl

Every run is a process of its own. The peers (PEFT, TRL) may be installed in an environment of their own: see --python.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # Python puts the folder that it runs on the path, but not its parent
sys.path.append(str(Path(__file__).parents[2] / "src"))  # for a checkout that is not installed

from trimtab import cli
from trimtab.commands._parser import MODEL, add_json, integer
from trimtab.commands._terminal import print_json, terminal


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trimtab bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", metavar="FILE", help="examples to train on; random ones of chat-like lengths unless given")
    add("--model", metavar="NAME", default="smollm2-135m-instruct", help=MODEL)
    add("--device", metavar="NAME", default="auto", help="auto, cpu, cuda, cuda:1, …, where every run computes (default: auto)")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="of the model (default: auto)")
    add("--rows", metavar="N", type=integer(1), default=64, help="how many examples (default: %(default)s)")
    add("--rows-per-step", metavar="N", type=integer(1), default=8, help="the effective batch size (default: %(default)s)")
    add("--rank", metavar="N", type=integer(1), default=8, help="of the LoRA that is trained (default: %(default)s)")
    add(
        "--targets", metavar="NAME", nargs="+", default=["all-linear"], help="the matrices that it adapts (default: all-linear)"
    )
    add("--objective", choices=("sft", "dpo", "kto"), default="sft", help="the training objective (default: %(default)s)")
    add("--pairs", metavar="N", type=integer(1), default=3, help="how often each trainer runs (default: %(default)s)")
    peers = "hf-peft, hf-peft-no-recompute, hf-peft-grouped, trl, trl-no-recompute"
    add("--against", metavar="PEER", nargs="+", help=f"{peers} (default: the first three; of dpo and kto, trl)")
    add("--python", metavar="PATH", default=sys.executable, help="the Python interpreter that has the peers")
    add("--output", metavar="FOLDER", type=Path, help="a new folder for results.json and a chart")
    add_json(parser)
    add("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Compare, and show the results."""
    from peers.compare import Settings, compare
    from peers.report import comparison_chart, comparison_table

    from trimtab.core import files

    if arguments.output is not None:
        files.refuse_existing(arguments.output)
    names = ("data", "model", "device", "dtype", "rows", "rows_per_step", "rank", "objective", "pairs", "python")
    settings = Settings(
        **{name: getattr(arguments, name) for name in names},
        targets=tuple(arguments.targets),
        against=tuple(arguments.against or (Settings.against if arguments.objective == "sft" else ("trl",))),
    )
    console = terminal()

    def show(name: str, result: dict[str, Any]) -> None:
        if not arguments.json:
            floor = result["gemm_floor_fraction"]
            share = f"{floor:4.0%} of the floor" if floor is not None else f"{result['rows_per_min']:.1f} rows/min"
            console.print(
                f"[dim]round {result['round']}[/] {name:22} {result['tokens_per_s']:7.1f} tokens/s  peak {result['peak_gb']:5.2f} GB  "
                f"{share}  [dim]{result['gemm_rate'] / 1e9:,.0f} GFLOP/s, load {result['load']:.1f}[/]"
            )

    results = compare(settings, show)
    data = Path(settings.data).name if settings.data else "random examples"
    title = (
        f"{data}: {settings.rows} examples, {settings.objective}, LoRA of rank {settings.rank} on {', '.join(settings.targets)}"
    )
    if arguments.json:
        print_json(results)
    else:
        console.print(comparison_table(results, title))
    if arguments.output is not None:
        with files.new_folder(arguments.output) as folder:
            files.write_json(folder / "results.json", results)
            files.write_text(folder / "chart.svg", comparison_chart(results, title))


def one(spec: str) -> None:
    """One run by Trimtab, in this process; prints its result as JSON."""
    from peers.run_trimtab import run

    print(json.dumps(run(json.loads(Path(spec).read_text()))))


if __name__ == "__main__":
    sys.exit(one(sys.argv[2]) if sys.argv[1:2] == ["one"] else cli.main(parser=parser))
