"""Which branches of the parts in mutants.py no test takes: python tests/branches.py [PART ...]; `make branches`.

Ends with an error if there are any. Lines marked `pragma: no cover` are for other systems than this one.
"""

import os
import sys
from pathlib import Path

import coverage
import pytest
from mutants import MODULES, PARTS, SOURCE


def main(parts: list[str]) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    chosen = [module for module, (part, _) in MODULES.items() if part in (parts or PARTS)]
    measured = coverage.Coverage(data_file=None, branch=True, include=[str(SOURCE / module) for module in chosen])
    measured.exclude(r"^\s*def .*: \.\.\.$")  # of protocols
    measured.start()
    tests = sorted({test for module in chosen for test in MODULES[module][1]})
    paths = [str(Path(__file__).parent / f"{test}.py") for test in tests]
    failed = pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", *paths])
    measured.stop()
    if failed:
        raise SystemExit("the tests fail")
    share = measured.report(show_missing=True)
    if share < 100:
        raise SystemExit(f"{share:.2f} %: not every branch is taken")


if __name__ == "__main__":
    main(sys.argv[1:])
