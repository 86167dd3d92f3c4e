"""Imports point downwards, neighbours do not know each other, and what is dangerous or heavy has one owner or none."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "trimtab"

FLOORS = [
    {"core"},
    {"base", "methods", "data", "artifacts"},
    {"engine"},
    {"objectives", "deploy"},
    {"train", "evaluate", "testing"},
    {"certify", "report", "track", "distributed", "launch"},
    {"run"},
    {"api", "migrate"},
    {"commands"},
    {"cli", "__main__"},
]
"""What stands on which floor, the lowest first. A file of a folder may import its neighbours in the folder, never in a circle."""

STACKED = [FLOORS[-1]]
"""Floors whose files build on each other, without a circle; on the others, neighbours do not know each other."""
NEVER = {("api", "report")}
"""Floors that are passed over though they are below."""
FAMILIES = {"methods", "objectives", "train/optimizers", "track", "distributed"}
"""Folders whose members do not know each other: they share the folder's own names, and the files whose names start with an underscore."""

OWNERS = {
    "transformers": {"base", "core/attention_hook", "testing", "train/optimizers/adafactor"},
    "rich": {"commands", "report"},
    "yaml": {"core/yaml12"},
    "argparse": {"cli", "commands"},
    "pydantic_core": {"core/config", "run/recipe"},
}
"""Outside libraries, and which folders or files alone may import them, even lazily."""
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__"}
UNSAFE_METHODS = {
    ("torch", "load"),
    ("yaml", "unsafe_load"),
    ("yaml", "full_load"),
    ("pandas", "read_pickle"),
    ("os", "system"),
}
UNSAFE_WORDS = {"trust_remote_code", "allow_pickle", "weights_only"}
DOORS = {"base/loading.py", "data/arrow_files.py"}
"""Files that call what could run code of a model or dataset, and so have to say REFUSES there."""
REFUSES = "trust_remote_code=False"
NAMES = {"core/other_tools.py", "core/other_tools_only.py", "migrate/axolotl.py"}
"""Files that hold the names of other tools' settings as texts."""

EXECUTES = "evaluate/function.py"
"""The file that runs a program of the user's, named by the user."""

LAZY = {"__init__.py", "core/config.py", "engine/backends/__init__.py"}
"""Files that import what a text names: the package's own names, and the members of a family."""

MOST_LINES_OF_A_FILE = 300
CORE, MOST_LINES_OF_CORE = FLOORS[0] | FLOORS[1] | FLOORS[2] | {"objectives", "train"}, 15000
"""What the loss of a step depends on; lines with something on them, and of families what everybody reads: see `_in_core`."""
FUSED = (
    "engine/backends/", "engine/layers.py", "engine/operations.py", "engine/patching.py", "engine/tree_attention.py",
    "engine/structure.py", "engine/watching.py", "engine/explain_", "engine/learning.py", "engine/recurrence.py",
)  # fmt: skip
MOST_LINES_OF_FUSED = 2900
"""Fused layers and what computes them, which repeat for speed what the rest says plainly: counted apart."""
MOST_LINES_OF_A_MEMBER = 130
"""Of a family, with something on them."""
MOST_LINES_OF_A_FUNCTION = 50

Sources = dict[str, str]
"""Path within the package, such as `data/load.py` -> the file's text."""


def real() -> Sources:
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in sorted(ROOT.rglob("*.py"))}


@cache
def nodes(text: str) -> list[ast.AST]:
    return list(ast.walk(ast.parse(text)))


def part_of(path: str) -> str:
    """The folder or file that stands on a floor; "" for the package's own __init__.py, which loads all lazily."""
    first = path.partition("/")[0].removesuffix(".py")
    return "" if first == "__init__" else first


def family_of(path: str) -> str:
    """The family whose folder a file is in; "" for others."""
    folder = path.rpartition("/")[0]
    return folder if folder in FAMILIES else ""


def floor_of(part: str) -> int:
    return next((number for number, floor in enumerate(FLOORS) if part in floor), -1)


def file_of(dotted: str, sources: Sources) -> str | None:
    """The file of a module of ours: `trimtab.data.load` -> data/load.py."""
    inner = dotted.removeprefix("trimtab").replace(".", "/").strip("/")
    return next((p for p in (f"{inner}.py", f"{inner}/__init__.py".lstrip("/")) if p in sources), None)


def imports(text: str, path: str, sources: Sources) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import in a file, wherever in it; a name imported from a package as the module it may be."""
    for node in nodes(text):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield node.lineno, "." * node.level + (node.module or "")
                continue
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield node.lineno, whole if file_of(whole, sources) else str(node.module)
        elif isinstance(node, ast.Attribute) and node.attr == "import_module" and path not in LAZY:
            yield node.lineno, "importlib.import_module"


def violations(sources: Sources) -> list[str]:
    found = []
    for path, text in sources.items():
        part = part_of(path)
        if part and floor_of(part) < 0:
            found.append(f"{path}: stands on no floor")
        found += [f"{path}:{line}: {problem}" for line, problem in [*_wrong_imports(path, text, sources), *_unsafe(text, path)]]
        found += [f"{path}:{line}: {problem}" for line, problem in _too_long(text)]
    found += [
        f"{path}: a member of {_filled(text)} lines"
        for path, text in sources.items()
        if family_of(path) and not Path(path).stem.startswith("_") and _filled(text) > MOST_LINES_OF_A_MEMBER
    ]
    found += [f"a circle: {' -> '.join(circle)}" for circle in circles(sources)]
    found += [f"a circle of folders: {' -> '.join(circle)}" for circle in folder_circles(sources)]
    low = sum(_filled(text) for path, text in sources.items() if part_of(path) in CORE and _in_core(path, sources))
    if low > MOST_LINES_OF_CORE:
        found.append(f"the core has {low} lines")
    fused = sum(_filled(text) for path, text in sources.items() if path.startswith(FUSED))
    if fused > MOST_LINES_OF_FUSED:
        found.append(f"the fused layers have {fused} lines")
    return found


def _filled(text: str) -> int:
    return sum(bool(line.strip()) for line in text.splitlines())


def _in_core(path: str, sources: Sources) -> bool:
    """Everything but a family's members and what only some of them share: files that the family's own __init__ does not name."""
    family = family_of(path)
    if path.startswith(FUSED):
        return False
    if not family or path.endswith("__init__.py"):
        return True
    front = f"{family}/__init__.py"
    return front in sources and any(file_of(name, sources) == path for _, name in imports(sources[front], front, sources))


def _wrong_imports(path: str, text: str, sources: Sources) -> Iterator[tuple[int, str]]:
    part = part_of(path)
    for line, name in imports(text, path, sources):
        top = name.partition(".")[0]
        if name.startswith(".") or name == "importlib.import_module":
            yield line, f"{name}: write imports in full"
        elif top in OWNERS and not {part, path.removesuffix(".py")} & OWNERS[top]:
            yield line, f"only {', '.join(sorted(OWNERS[top]))} may import {top}"
        elif top in UNSAFE_MODULES:
            yield line, f"{top} can run what it reads"
        elif top == "trimtab" and (target := file_of(name, sources)) is None:
            yield line, f"no file is {name}"
        elif top == "trimtab" and part:
            yield from ((line, problem) for problem in _wrong_way(path, part_of(target), target))


def _wrong_way(path: str, other: str, target: str) -> Iterator[str]:
    part = part_of(path)
    if other == part:
        name = Path(target).stem
        if family_of(path) == family_of(target) != "" and not Path(path).stem.startswith("_") and not name.startswith("_"):
            yield f"{path} may not know its sibling {target}"
        return
    if not other:
        return  # the package's own __init__.py: its version
    if floor_of(other) > floor_of(part):
        yield f"{other} is above {part}"
    elif (part, other) in NEVER:
        yield f"{part} may not know {other}"
    elif floor_of(other) == floor_of(part) and FLOORS[floor_of(part)] not in STACKED:
        yield f"{part} may not know its neighbour {other}"


def _unsafe(text: str, path: str) -> Iterator[tuple[int, str]]:
    refused = REFUSES if path in DOORS else None
    for node in nodes(text):
        if isinstance(node, ast.Call) and _loads(node) and not any(ast.unparse(k) == refused for k in node.keywords):
            yield node.lineno, f"{ast.unparse(node.func)} can run code that it finds: say {REFUSES}, in a door"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in UNSAFE_CALLS:
                yield node.lineno, f"{node.func.id}() runs what it is given"
            elif node.func.id in ("print", "Console") and path != "commands/_terminal.py":
                yield node.lineno, "only commands/_terminal.py prints"
            elif (
                node.func.id == "open"
                and path not in ("core/files.py", "core/locks.py")
                and any("w" in w or "a" in w for w in _modes(node))
            ):
                yield node.lineno, "only files.py writes"
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and (node.value.id, node.attr) in UNSAFE_METHODS
        ):
            yield node.lineno, f"{node.value.id}.{node.attr} can run what it reads"
        if isinstance(node, ast.Attribute) and node.attr in ("exec_module", "load_module") and path != EXECUTES:
            yield node.lineno, f"only {EXECUTES} runs a program of the user's"
        if isinstance(node, ast.Attribute) and node.attr in ("write_text", "write_bytes") and path != "core/files.py":
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            if owner != "files":
                yield node.lineno, "only files.py writes"
        words = {node.id} if isinstance(node, ast.Name) else set()
        words |= {node.arg} if isinstance(node, ast.keyword) and ast.unparse(node) != refused else set()
        words |= {node.value} if isinstance(node, ast.Constant) and isinstance(node.value, str) else set()
        yield from (
            (getattr(node, "lineno", 0), f"{word} is never wanted") for word in words & UNSAFE_WORDS if path not in NAMES
        )
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (node.module, alias.name) in UNSAFE_METHODS:
                    yield node.lineno, f"{node.module}.{alias.name} can run what it reads"


def _loads(call: ast.Call) -> bool:
    """Whether Transformers or datasets reads a folder or hub here; PEFT's own configurations hold no code."""
    name = ast.unparse(call.func)
    return name.endswith("load_dataset") or (name.endswith((".from_pretrained", ".from_config")) and "Auto" in name)


def _modes(call: ast.Call) -> Iterator[str]:
    for node in [*call.args[1:2], *(k.value for k in call.keywords if k.arg == "mode")]:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def _too_long(text: str) -> Iterator[tuple[int, str]]:
    lines = text.count("\n")
    if lines > MOST_LINES_OF_A_FILE:
        yield lines, f"has {lines} lines"
    for node in nodes(text):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            if length > MOST_LINES_OF_A_FUNCTION:
                yield node.lineno, f"{node.name} has {length} lines"


def circles(sources: Sources) -> list[list[str]]:
    """Every circle of imports, lazy ones and those for type checkers among them; one a strongly connected set.

    Importing `a.b` runs `a/__init__.py` first, so that counts as imported too, but by the files of `a` itself.
    """
    graph: dict[str, set[str]] = {path: set() for path in sources}
    for path, text in sources.items():
        for _, name in imports(text, path, sources):
            target = file_of(name, sources) if name.partition(".")[0] == "trimtab" else None
            if target is None:
                continue
            graph[path].add(target)
            package = f"{part_of(target)}/__init__.py"
            if part_of(target) != part_of(path) and package in sources:
                graph[path].add(package)
    return [
        sorted(group) for group in _strongly_connected(graph) if len(group) > 1 or next(iter(group)) in graph[next(iter(group))]
    ]


def folder_circles(sources: Sources) -> list[list[str]]:
    """Every circle of folders, top-level files among them, whichever floors they stand on."""
    graph: dict[str, set[str]] = {part_of(path): set() for path in sources}
    for path, text in sources.items():
        for _, name in imports(text, path, sources):
            target = file_of(name, sources) if name.partition(".")[0] == "trimtab" else None
            if target is not None and part_of(path) and part_of(target) not in ("", part_of(path)):
                graph[part_of(path)].add(part_of(target))
    return [sorted(group) for group in _strongly_connected(graph) if len(group) > 1]


def _strongly_connected(graph: dict[str, set[str]]) -> list[set[str]]:
    """Files that reach each other; small enough to be counted out."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = list(graph[start])
        while waiting:
            one = waiting.pop()
            if one not in seen:
                seen.add(one)
                waiting += graph[one]
        return seen

    reach = {path: reached(path) for path in graph}
    groups: list[set[str]] = []
    for path in graph:
        if path in reach[path] and not any(path in group for group in groups):
            groups.append({other for other in reach[path] if path in reach[other]})
    return groups


def test_the_house_keeps_its_rules():
    sources = real()
    assert len(sources) > 30
    assert violations(sources) == []


def test_every_floor_is_built():
    parts = {part_of(path) for path in real()} - {""}
    assert parts == set().union(*FLOORS)


@cache
def known_violations() -> list[str]:
    return violations(real())


PLANTED = {
    "a file that runs what it is given": (
        "run/recipe.py", "spec.loader.exec_module(module)", "only evaluate/function.py runs a program of the user's"
    ),
    "a lower floor that knows a higher one": ("core/files.py", "from trimtab.base import Base", "base is above core"),
    "the same, lazily": ("engine/head.py", "def f():\n    from trimtab.train import Step", "train is above engine"),
    "the same, by the whole package": ("data/read.py", "import trimtab.engine.decode", "engine is above data"),
    "the same, as a name of the package": ("base/model.py", "from trimtab import run", "run is above base"),
    "the same, for the type checker": (
        "methods/lora.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from trimtab.train import Step", "train is above methods"
    ),
    "a neighbour": ("methods/_base.py", "from trimtab.data import Pack", "methods may not know its neighbour data"),
    "another neighbour": ("artifacts/adapter.py", "from trimtab.base.locate import EMBEDDED", "artifacts may not know its neighbour base"),
    "deploy that knows train": ("deploy/merging.py", "import trimtab.train", "train is above deploy"),
    "evaluate that knows train": ("evaluate/scores.py", "from trimtab.train.loop import Step", "evaluate may not know its neighbour train"),
    "deploy that knows evaluate": ("deploy/target.py", "from trimtab.evaluate import score", "evaluate is above deploy"),
    "evaluate that knows report": ("evaluate/scores.py", "from trimtab.report import RunObserver", "report is above evaluate"),
    "a method that knows another": (
        "methods/new.py", "from trimtab.methods.lora import LoRA", "methods/new.py may not know its sibling methods/lora.py"
    ),
    "the same, as a name of the folder": (
        "methods/new.py", "from trimtab.methods import AdapterLayer, lora", "methods/new.py may not know its sibling methods/lora.py"
    ),
    "an objective that knows another": (
        "objectives/new.py", "def f():\n    from trimtab.objectives import sft", "objectives/new.py may not know its sibling objectives/sft.py"
    ),
    "transformers outside base and engine": (
        "deploy/merging.py", "import transformers", "only base, core/attention_hook, testing, train/optimizers/adafactor may import transformers"
    ),
    "the same, lazily and deep": (
        "train/loop.py", "def f():\n    from transformers.utils import logging",
        "only base, core/attention_hook, testing, train/optimizers/adafactor may import transformers"
    ),
    "rich where nothing is shown": ("run/script.py", "from rich.console import Console", "only commands, report may import rich"),
    "printing where nothing is shown": ("train/loop.py", "print('step')", "only commands/_terminal.py prints"),
    "printing past the door": ("commands/work.py", "def f():\n    print('x')", "only commands/_terminal.py prints"),
    "another console": ("report/tables.py", "from rich.console import Console\nConsole().print(1)", "only commands/_terminal.py prints"),
    "an import that does not say from where": ("data/load.py", "from .order import split", ".order: write imports in full"),
    "an import that is hidden": (
        "data/load.py", "import importlib\nimportlib.import_module('trimtab.run.script')", "importlib.import_module: write imports in full"
    ),
    "an import of what is not there": ("cli.py", "import trimtab.nothing", "no file is trimtab.nothing"),
    "a pickle": ("data/read.py", "import pickle", "pickle can run what it reads"),
    "a pickle's part": ("data/read.py", "from dill import loads", "dill can run what it reads"),
    "torch.load": ("artifacts/adapter.py", "import torch\ntorch.load('x')", "torch.load can run what it reads"),
    "torch.load by name": ("artifacts/adapter.py", "from torch import load", "torch.load can run what it reads"),
    "eval": ("core/config.py", "eval('1')", "eval() runs what it is given"),
    "exec": ("cli.py", "def f():\n    exec('1')", "exec() runs what it is given"),
    "a door that does not say that code is refused": (
        "base/loading.py", "AutoConfig.from_pretrained('x')", "can run code that it finds: say trust_remote_code=False, in a door"
    ),
    "another door": ("base/model.py", "f(trust_remote_code=False)", "trust_remote_code is never wanted"),
    "code from the hub": ("base/loading.py", "f(trust_remote_code=True)", "trust_remote_code is never wanted"),
    "the same, hidden in a dictionary": ("base/model.py", "f(**{'trust_remote_code': True})", "trust_remote_code is never wanted"),
    "another YAML": ("run/recipe.py", "import yaml", "only core/yaml12 may import yaml"),
    "another writer": ("run/script.py", "open('x', 'w')", "only files.py writes"),
    "another writer, by a path": ("deploy/merging.py", "path.write_text('x')", "only files.py writes"),
    "a file on no floor": ("helpers.py", "", "stands on no floor"),
    "a folder on no floor": ("utils/__init__.py", "", "stands on no floor"),
    "a file that is too long": ("data/more.py", "x = 1\n" * 301, "has 301 lines"),
    "a member that is too long": ("methods/new.py", "x = 1\n" * 131, "a member of 131 lines"),
    "a function that is too long": ("data/more.py", "def f():\n" + "    x = 1\n" * 50, "f has 51 lines"),
}  # fmt: skip


@pytest.mark.parametrize(("path", "text", "expected"), PLANTED.values(), ids=PLANTED)
def test_it_notices(path, text, expected):
    """Each planted in the real tree, alone."""
    sources = real()
    before = known_violations()
    sources[path] = sources.get(path, "") + ("\n" if path in sources else "") + text + "\n" * (not text.endswith("\n"))
    new = [problem for problem in violations(sources) if problem not in before]
    assert any(problem.startswith(path) and problem.endswith(expected) for problem in new), new


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"core/errors.py": "import trimtab.core.files"}, "a circle: core/errors.py -> core/files.py"),
        (
            {"core/errors.py": "def f():\n    from trimtab.core import config"},
            "a circle: core/config.py -> core/errors.py -> core/yaml12.py",
        ),
        ({"run/recipe.py": "def f():\n    from trimtab.run.script import run_recipe"}, "run/script.py"),
        (
            {"data/order.py": "def f():\n    from trimtab.data.load import load_data"},
            "data/load.py -> data/mixture.py -> data/order.py",
        ),
        ({"train/config.py": "from trimtab.train.loop import Step"}, "a circle: train/config.py -> train/loop.py"),
        ({"core/files.py": "import trimtab.core.files"}, "a circle: core/files.py"),
        ({"methods/_base.py": "from trimtab.methods import attach"}, "a circle: methods/__init__.py"),
        ({"cli.py": "from trimtab.__main__ import main"}, "a circle: __main__.py -> cli.py"),
        ({"api.py": "import trimtab"}, "__init__.py -> api.py"),
    ],
    ids=str,
)
def test_it_notices_a_circle_even_a_lazy_one(changes, expected):
    sources = real()
    for path, text in changes.items():
        sources[path] += f"\n{text}\n"
    assert any(problem.startswith("a circle: ") and expected in problem for problem in violations(sources)), violations(sources)


def test_it_notices_a_circle_of_folders_that_is_none_of_files():
    sources = real()
    sources |= {"train/more.py": "from trimtab.run import recipe", "run/more.py": "from trimtab.train import config"}
    found = [problem for problem in violations(sources) if problem.startswith("a circle of folders: ")]
    assert len(found) == 1
    assert {"run", "train"} <= set(found[0].removeprefix("a circle of folders: ").split(" -> "))
    assert not folder_circles(real())


def test_it_notices_a_ground_that_grows_too_heavy():
    sources = real()
    sources |= {f"engine/more{n}.py": "x = 1\n" * 290 for n in range(20)}
    assert any(problem.startswith("the core has ") for problem in violations(sources))


def test_it_notices_fused_layers_that_grow_too_heavy():
    sources = real()
    sources |= {f"engine/backends/more{n}.py": "x = 1\n" * 200 for n in range(12)}
    assert any(problem.startswith("the fused layers have ") for problem in violations(sources))


def test_a_method_may_use_what_its_folder_offers():
    sources = real()
    sources["methods/new.py"] = "from trimtab.methods import AdapterLayer, Method, find_matrices\n"
    assert violations(sources) == known_violations()


def test_a_house_of_one_room_is_fine():
    """The baseline of the planted ones: clean text is not reported."""
    assert (
        violations(
            {"core/errors.py": "import sys\n", "cli.py": "from trimtab.core.errors import listing\nlisting(model.eval())\n"}
        )
        == []
    )
