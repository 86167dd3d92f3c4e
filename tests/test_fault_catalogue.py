"""Every fault of the catalogue's chapters A, B, C and F has tests that exist, and none is silent."""

import ast
from fnmatch import fnmatch
from pathlib import Path

from fault_catalogue import FAULTS, MISSING

HERE = Path(__file__).parent


def functions(name):
    path = HERE / "invariants" / "suite.py" if name == "suite" else HERE / f"{name}.py"
    return [node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]


def test_none_is_left_out():
    wanted = {f"{chapter}{n:02}" for chapter, count in (("A", 25), ("B", 19), ("C", 18), ("F", 7)) for n in range(1, count + 1)}
    assert wanted <= FAULTS.keys() | MISSING.keys()
    assert not FAULTS.keys() & MISSING.keys()


def test_every_test_is_there_and_no_fault_is_silent():
    missing = []
    for fault in FAULTS.values():
        assert fault.outcome in ("refused", "repaired", "shown", "impossible")
        for test in fault.tests:
            name, _, function = test.partition("::")
            if not any(fnmatch(one, function) for one in functions(name)):
                missing.append(test)
    assert missing == []
