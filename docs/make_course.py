"""Run the course's scripts and write what they print into docs/course.md, and how long they took: python docs/make_course.py.

The steps go on from each other in runs/course, which is emptied first. A step's output is the first text block after its name on the page.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "course.md"
TOOK = r"They took .* together\."


def printed(script: Path) -> str:
    """What a step prints, without warnings and progress bars, which go to the standard error."""
    done = subprocess.run([sys.executable, script], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.rstrip("\n")


def write(pattern: str, words: str) -> None:
    """Put `words` in the place of what follows `before` on the page."""
    page, count = re.subn(
        pattern, lambda found: found["before"] + words, PAGE.read_text(encoding="utf-8"), count=1, flags=re.DOTALL
    )
    if not count:
        raise SystemExit(f"{PAGE}: nothing matches {pattern}")
    PAGE.write_text(page, encoding="utf-8")


def main() -> None:
    shutil.rmtree(ROOT / "runs" / "course", ignore_errors=True)
    start = time.monotonic()
    for script in sorted((ROOT / "examples").glob("[0-9][0-9]_*.py")):
        began = time.monotonic()
        write(rf"(?P<before>examples/{script.name}\).*?\n```text\n).*?(?=\n```)", printed(script))
        sys.stderr.write(f"{script.name}: {time.monotonic() - began:.0f} s\n")
    minutes = (time.monotonic() - start) / 60
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    write(f"(?P<before>){TOOK}", f"They took {minutes:.0f} minutes with {threads} thread{'s' * (threads > 1)} together.")


if __name__ == "__main__":
    main()
