"""Write examples/course.ipynb from the course's scripts: python docs/make_notebook.py. A test checks that it is current.

Each script is a text cell, its docstring, and a code cell, the rest. There are no outputs: docs/course.md shows them.
"""

import ast
import json
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NOTEBOOK = EXAMPLES / "course.ipynb"
FIRST = """# Fine-tuning with adapters, step by step

Made by docs/make_notebook.py from the scripts beside it. The steps build on each other, read demo/train.jsonl and write to runs/course,
so run them in the root of a checkout: `%cd ..` first, if the notebook was opened in its own folder. docs/course.md shows what each prints."""


def scripts() -> list[Path]:
    return sorted(EXAMPLES.glob("[0-9][0-9]_*.py"))


def _cell(kind: str, number: int, text: str) -> dict[str, object]:
    lines = text.strip("\n").splitlines(keepends=True)
    code = {"execution_count": None, "outputs": []} if kind == "code" else {}
    return {"cell_type": kind, "id": f"{kind}-{number}", "metadata": {}, "source": lines, **code}


def notebook() -> str:
    """The notebook's text, in the form 4.5 of nbformat."""
    cells = [_cell("markdown", 0, FIRST)]
    for number, path in enumerate(scripts(), start=1):
        text = path.read_text(encoding="utf-8")
        docstring = ast.parse(text).body[0]
        code = "".join(text.splitlines(keepends=True)[docstring.end_lineno :])
        cells += [_cell("markdown", number, f"## {ast.get_docstring(ast.parse(text))}"), _cell("code", number, code)]
    python = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return (
        json.dumps({"cells": cells, "metadata": python, "nbformat": 4, "nbformat_minor": 5}, ensure_ascii=False, indent=1)
        + "\n"
    )


if __name__ == "__main__":
    NOTEBOOK.write_text(notebook(), encoding="utf-8")
