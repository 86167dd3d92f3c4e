"""Run the course's scripts and write what they print into docs/course.md, and how long they took to compute.

    python docs/make_course.py              # about ten minutes
    python docs/make_course.py 08 09        # these steps alone, on what the others left in runs/course

A step's output is the first text block after its name on the page.
"""

import json
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "course.md"
SECONDS = ROOT / "runs" / "course" / "seconds.json"
TOOK = r"They took \d+ minutes of a core's time"


def printed(script: Path) -> str:
    """What a step prints, without warnings and progress bars, which go to the standard error."""
    done = subprocess.run([sys.executable, script], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.rstrip("\n")


def computed() -> float:
    """The seconds that steps have kept a core busy: unlike the clock's, they don't depend on what else the machine does."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def write(pattern: str, words: str) -> None:
    """Put `words` in the place of what follows `before` on the page."""
    page, count = re.subn(
        pattern, lambda found: found["before"] + words, PAGE.read_text(encoding="utf-8"), count=1, flags=re.DOTALL
    )
    if not count:
        raise SystemExit(f"{PAGE}: nothing matches {pattern}")
    PAGE.write_text(page, encoding="utf-8")


def main(names: list[str]) -> None:
    seconds = json.loads(SECONDS.read_text(encoding="utf-8")) if names else {}
    if not names:
        shutil.rmtree(SECONDS.parent, ignore_errors=True)
        SECONDS.parent.mkdir(parents=True)
    for script in sorted((ROOT / "examples").glob("[0-9][0-9]_*.py")):
        if names and script.name[:2] not in names:
            continue
        before = computed()
        write(rf"(?P<before>examples/{script.name}\).*?\n```text\n).*?(?=\n```)", printed(script))
        seconds[script.name] = round(computed() - before)
        SECONDS.write_text(json.dumps(seconds), encoding="utf-8")
    write(f"(?P<before>){TOOK}", f"They took {sum(seconds.values()) / 60:.0f} minutes of a core's time")


if __name__ == "__main__":
    main(sys.argv[1:])
