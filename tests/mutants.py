"""Which faults that are put into the code the tests see: python tests/mutants.py [--count 600] [--skip 0] [--only PART ...]; `make mutants`.

The faults are cosmic-ray's (https://cosmic-ray.readthedocs.io): another operator, comparison or number, a condition negated, a
loop that never runs, an exception that is not caught, and so on; not those in annotations, which decide nothing. A sample of
them, the same each time, is tried one by one: in a process in which the faulty module stands in for the one on disk, the
tests of its part are run until one fails. Where none does, the fault survives, and is printed.
"""

import argparse
import ast
import hashlib
import importlib.machinery
import importlib.util
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple, NoReturn

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "trimtab"
HEAVY = {
    "torch",
    "transformers",
    "tokenizers",
    "numpy",
    "safetensors",
    "pydantic",
    "datasets",
    "pyarrow",
    "peft",
    "trl",
    "accelerate",
}
"""Packages that are imported once, for all."""
PATIENCE = 4
"""A fault that makes the tests take this many times as long, and a minute, is seen: most such run in circles."""
EQUIVALENT = ROOT / "tests" / "equivalent_mutants.json"
"""Faults that are none, because the code does the same: {"MODULE: line -> the line as it is then": why}."""
PARTS = {
    "labels": {
        "data/token_rows.py data/rendering.py data/example.py": "test_data_labels test_data_compared test_check test_data_load",
        "data/preference_formats.py": "test_data_compared test_preference",
    },
    "masks": {"data/prefix_tree.py": "test_data_tree test_packing test_tree_attention"},
    "packing": {
        "data/pack.py data/bin_packing.py data/order.py": "test_data_tree test_packing test_mismatched test_data_load test_preference",
        "data/mismatched.py": "test_objectives test_preference test_mismatched",
    },
    "loss": {
        "engine/head.py": "test_head test_objectives test_mismatched test_train",
        "objectives/_base.py objectives/_pairs.py objectives/_kl_estimate.py objectives/cpo.py objectives/dpo.py objectives/kto.py "
        "objectives/orpo.py objectives/sft.py objectives/simpo.py": "test_objectives test_preference test_mismatched test_keys",
    },
    "loader": {
        "data/read.py data/text_files.py data/json_files.py data/strict_json.py data/load.py data/formats.py":
            "test_data_read test_data_shapes test_data_load test_data_cache test_bad_data test_check",
    },
    "checkpoint": {
        "core/files.py": "test_files test_resume",
        "artifacts/adapter.py": "test_files test_peft test_faults test_cli",
        "artifacts/tensors.py": "test_files test_resume test_peft",
        "run/checkpoints.py run/resume.py run/claim.py artifacts/state.py": "test_guards test_resume test_keys test_certificate",
        "train/optimizer.py": "test_guards test_train test_resume",
    },
}  # fmt: skip
"""Modules, and the tests that are there for them."""
MODULES = {
    module: (part, tuple(tests.split()))
    for part, several in PARTS.items() for modules, tests in several.items() for module in modules.split()
}  # fmt: skip


def tests_of(part: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(test for _, tests in (one for one in MODULES.values() if one[0] == part) for test in tests))


@dataclass(frozen=True)
class Mutant:
    part: str
    module: str
    operator: str
    number: int
    """Of the places where the operator can act."""
    line: int

    @cached_property
    def source(self) -> str:
        from cosmic_ray.mutating import mutate_code
        from cosmic_ray.plugins import get_operator

        return mutate_code((SOURCE / self.module).read_text(encoding="utf-8"), get_operator(self.operator)(), self.number)

    @cached_property
    def difference(self) -> tuple[str, str]:
        """The lines that differ, before and after."""
        one, two = (SOURCE / self.module).read_text(encoding="utf-8").splitlines(), self.source.splitlines()
        first = next((n for n, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
        from_end = 0
        while from_end < min(len(one), len(two)) - first and one[-1 - from_end] == two[-1 - from_end]:
            from_end += 1
        before, after = (" ".join(map(str.strip, lines[first : len(lines) - from_end])) for lines in (one, two))
        return before, after

    @property
    def key(self) -> str:
        """What stays when other lines change."""
        return f"{self.module}: {self.difference[0]} -> {self.difference[1]}"


def mutants(part: str, module: str) -> Iterator[Mutant]:
    """All of a module."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    source = (SOURCE / module).read_text(encoding="utf-8")
    nodes, skipped = list(ast_nodes(get_ast(source))), _annotations(source)
    for name in operator_names():
        if get_operator(name).arguments():  # it wants to be told what to change into what
            continue
        operator = get_operator(name)()
        places = [start for node in nodes for start, _ in operator.mutation_positions(node)]
        for number, start in enumerate(places):
            if not any(begin <= start < end for begin, end in skipped):
                yield Mutant(part, module, name, number, start[0])


def _annotations(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where annotations begin and end, in lines and columns."""
    tree = ast.parse(source)
    found: list[ast.expr | None] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.append(node.returns)
        if isinstance(node, ast.arg | ast.AnnAssign):
            found.append(node.annotation)
    return [((one.lineno, one.col_offset), (one.end_lineno or 0, one.end_col_offset or 0)) for one in found if one is not None]


def sample(parts: list[str], count: int, skip: int = 0) -> list[Mutant]:
    """So many of all, chosen by a hash of what they are, behind those that are skipped; those of a module in a row."""

    def drawn(mutant: Mutant) -> str:
        return hashlib.sha256(f"{mutant.module} {mutant.operator} {mutant.number}".encode()).hexdigest()

    found = [mutant for module, (part, _) in MODULES.items() if part in parts for mutant in mutants(part, module)]
    return sorted(sorted(found, key=drawn)[skip : skip + count], key=lambda mutant: (mutant.part, mutant.module, mutant.line))


class _Instead(importlib.machinery.SourceFileLoader):
    """Loads a module from a text that is not the file's; first on sys.meta_path, it finds it too."""

    def __init__(self, name: str, path: Path, text: str) -> None:
        super().__init__(name, str(path))
        self.text = text

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.util.spec_from_file_location(name, self.path, loader=self) if name == self.name else None

    def get_code(self, fullname: str):
        return compile(self.text, self.path, "exec")


def _run(tests: tuple[str, ...], mutant: Mutant | None, folder: Path) -> NoReturn:
    """In a process of its own: the tests, then its end, with 0 if all pass."""
    os.setsid()
    out = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    status = 1
    try:
        if mutant is not None:
            name = "trimtab." + mutant.module.removesuffix(".py").replace("/", ".")
            sys.meta_path.insert(0, _Instead(name, SOURCE / mutant.module, mutant.source))
        import pytest

        options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--basetemp", str(folder / "pytest")]
        options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # what `ready` has imported is not rewritten
        status = int(pytest.main([*options, *(str(ROOT / "tests" / f"{test}.py") for test in tests)]))
        if mutant is None:
            (folder / "modules.json").write_text(json.dumps([m for m in sys.modules if m.partition(".")[0] in HEAVY]))
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class _Trial(NamedTuple):
    mutant: Mutant | None
    folder: tempfile.TemporaryDirectory
    started: float
    limit: float
    """Seconds."""


def _begin(mutant: Mutant | None, tests: tuple[str, ...], limit: float) -> tuple[int, _Trial]:
    trial = _Trial(mutant, tempfile.TemporaryDirectory(prefix="mutant-"), time.monotonic(), limit)
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        _run(tests, mutant, Path(trial.folder.name))
    return process, trial


def _ended(running: dict[int, _Trial]) -> tuple[_Trial, int]:
    """The next that ends, or takes too long, and its status."""
    while True:
        for process, trial in running.items():
            done, status = os.waitpid(process, os.WNOHANG)
            late = time.monotonic() - trial.started > trial.limit
            if done or late:
                with suppress(ProcessLookupError):
                    os.killpg(process, signal.SIGKILL)  # also what its tests have started
                if late and not done:
                    os.waitpid(process, 0)
                del running[process]
                return trial, 1 if late and not done else status
        time.sleep(0.02)


@cache
def equivalent() -> dict[str, str]:
    return json.loads(EQUIVALENT.read_text(encoding="utf-8")) if EQUIVALENT.exists() else {}


def ready(parts: list[str]) -> dict[str, float]:
    """See the tests pass without a fault, and import here what they import, so that no trial has to; each part's seconds."""
    seconds = {}
    for part in parts:
        process, trial = _begin(None, tests_of(part), 3600)
        _, status = _ended({process: trial})
        text = (Path(trial.folder.name) / "output.txt").read_text()
        if status:
            raise SystemExit(f"the tests of {part} fail without any fault:\n{text[-3000:]}")
        for module in json.loads((Path(trial.folder.name) / "modules.json").read_text()):
            with suppress(Exception):
                importlib.import_module(module)
        trial.folder.cleanup()
        seconds[part] = time.monotonic() - trial.started
        print(f"{part}: {seconds[part]:.0f} s for a fault that survives: {text.splitlines()[-1]}", flush=True)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=600)
    parser.add_argument("--skip", type=int, default=0, help="so many, to try others than before")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    asked = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # threads do not survive a fork
    os.environ["PYTEST_XDIST_WORKER_COUNT"] = str(os.cpu_count())  # so that each trial computes on one
    seconds = ready(asked.only)
    left = sample(asked.only, asked.count, asked.skip)
    print(f"{len(left)} faults", flush=True)
    running: dict[int, _Trial] = {}
    counts: dict[str, list[int]] = {part: [0, 0, 0] for part in asked.only}
    while left or running:
        while left and len(running) < asked.jobs:
            mutant = left.pop(0)
            if mutant.key in equivalent():
                counts[mutant.part][2] += 1
                continue
            process, trial = _begin(mutant, MODULES[mutant.module][1], 60 + PATIENCE * seconds[mutant.part])
            running[process] = trial
        if not running:
            break
        trial, status = _ended(running)
        mutant, survived = trial.mutant, status == 0
        assert mutant is not None
        counts[mutant.part][survived] += 1
        if not len(left) % 50:
            print(f"{len(left)} left", flush=True)
        if survived:
            print("{}:{} survives\n  - {}\n  + {}".format(mutant.module, mutant.line, *mutant.difference), flush=True)
        trial.folder.cleanup()
    for part, (seen, survived, same) in counts.items():
        print(f"{part}: {seen} of {seen + survived} seen, {seen / max(1, seen + survived):.1%}; {same} change nothing")
    seen, survived, _ = (sum(each) for each in zip(*counts.values(), strict=True))
    print(f"in all {seen} of {seen + survived}: {seen / max(1, seen + survived):.1%}")


if __name__ == "__main__":
    main()
