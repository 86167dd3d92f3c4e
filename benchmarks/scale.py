"""Training on several devices: figures from first principles, and what two processes on a CPU measure. Both fill docs/scale.md.

    python benchmarks/scale.py tables      # memory, step time and communication on 1 to 64 GPUs, computed
    python benchmarks/scale.py speed       # SmolLM2 in one process and in two, one thread each, in turn: run it on an idle machine
        [--data demo/train.jsonl] [--processes 2] [--rows 64] [--steps 4] [--rounds 3]

What `speed` measures is added to docs/measured/scale.json. A test holds the page to both.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "scale.md"


def page() -> str:
    """docs/scale.md with current tables."""
    from at_scale import speed
    from at_scale.tables import tables

    text = PAGE.read_text(encoding="utf-8")
    for name, table in (tables() | {"measured: speed": speed.table()}).items():
        text = filled(text, name, table)
    return text


def filled(text: str, name: str, content: str) -> str:
    """A page with new content between two marks."""
    before, found, rest = text.partition(f"<!-- {name} -->\n")
    _, ended, after = rest.partition(f"<!-- end of {name} -->\n")
    if not (found and ended):
        sys.exit(f"docs/scale.md has no marks for {name}")
    return f"{before}{found}{content}{ended}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["tables", "speed"])
    parser.add_argument("--data", default=str(ROOT / "demo" / "train.jsonl"))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rows", type=int, default=64, help="examples a step")
    parser.add_argument("--steps", type=int, default=4, help="of each run; the first does not count")
    parser.add_argument("--rounds", type=int, default=3, help="of one process and several")
    words = parser.parse_args()
    if words.command == "speed":
        from at_scale.speed import measure

        measure(words.data, words.processes, words.rows, words.steps, words.rounds)
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
