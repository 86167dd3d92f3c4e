"""Training on several devices: figures from first principles, and what two processes on a CPU measure. Both for docs/scale.md.

python benchmarks/scale.py tables       # memory, step time and communication on 1 to 64 GPUs, computed; a test holds the page to it
"""

import sys
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "scale.md"


def page() -> str:
    """docs/scale.md with current tables."""
    from at_scale.tables import tables

    text = PAGE.read_text(encoding="utf-8")
    for name, table in tables().items():
        text = filled(text, name, table)
    return text


def filled(text: str, name: str, content: str) -> str:
    """A page with new content between two marks."""
    before, found, rest = text.partition(f"<!-- {name} -->\n")
    _, ended, after = rest.partition(f"<!-- end of {name} -->\n")
    if not (found and ended):
        sys.exit(f"docs/scale.md has no marks for {name}")
    return f"{before}{found}{content}{ended}{after}"


if __name__ == "__main__":
    if sys.argv[1:] == ["tables"]:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        sys.exit(__doc__)
