"""Real kills of training until there have been enough: python tests/soak.py [KILLS]. `make soak` asks for a thousand.

The recipes of `kills.py` take turns. Ends with an error at the first run that does not end, to the last bit, as it would have without.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from kills import FILES, RECIPES
from test_resume import assert_same
from worlds import ROWS, make_model, write_rows


def main(wanted: int) -> None:
    kills, seed = 0, 0
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        make_model(folder / "tiny", 0)
        write_rows(folder / "rows.jsonl", ROWS)
        for name, rows in FILES.items():
            write_rows(folder / name, rows)
        os.chdir(folder)
        while kills < wanted or seed < len(RECIPES):
            name, recipe = list(RECIPES.items())[seed % len(RECIPES)]
            (folder / "r.yaml").write_text(recipe)
            done = subprocess.run(
                [sys.executable, Path(__file__).parent / "kills.py", folder, str(-(-wanted // len(RECIPES))), str(seed)],
                capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            said = [json.loads(line) for line in done.stdout.splitlines()]
            if done.returncode or any(line["status"] not in (0, -9) for line in said):
                raise SystemExit(f"{name}, seed {seed}: {done.stderr[-3000:]}")
            for run in {line["run"] for line in said}:
                assert_same(run, "spared")
            kills += sum(line["status"] == -9 for line in said)
            resumed = sum(line["status"] == -9 and line["saved"] > 0 for line in said)
            sys.stdout.write(
                f"{kills:,} kills, every run as if there had been none ({name}: {resumed} resumed from a checkpoint)\n"
            )
            sys.stdout.flush()
            for path in [*folder.glob("run-*"), folder / "spared"]:
                subprocess.run(["rm", "-rf", path], check=True)
            seed += 1


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 1000)
