"""The example scripts run, on a tiny base, and do what they say."""

import ast
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from templates import saved_base

import trimtab

SCRIPT = Path(__file__).parents[1] / "examples" / "train_loop.py"
ROWS = [{"prompt": f"Is {n} a number?", "completion": "yes"} for n in range(30)]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def script():
    specification = importlib.util.spec_from_file_location("train_loop", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def words(tmp_path):
    saved_base(tmp_path / "tiny")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return ["--base", str(tmp_path / "tiny"), "--data", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "adapter")]


def test_the_loop_trains_evaluates_saves_and_answers(script, words, tmp_path, capsys):
    script.main([*words, "--held-out", "6", "--rank", "4", "--epochs", "6", "--lr", "2e-2", "--evaluate-every", "9"])
    out = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"^step +\d+  loss ([\d.]+)", out, flags=re.MULTILINE)]
    assert len(losses) == 18
    assert losses[-1] < 0.2 * losses[0]
    assert len(re.findall(r"held-out loss [\d.]+$", out, flags=re.MULTILINE)) == 2
    before, after = map(float, re.search(r"held-out loss ([\d.]+) before, ([\d.]+) after", out).groups())
    assert after < 0.2 * before
    assert re.search(r"^expected: yes\nbefore:   (?!yes$).*\nafter:    yes$", out, flags=re.MULTILINE)

    base = trimtab.load(str(tmp_path / "tiny"))
    held_out = trimtab.rows(str(tmp_path / "rows.jsonl"), base)[-6:]
    assert trimtab.score_loss(base, held_out).loss == pytest.approx(before, abs=1e-4)
    adapter = trimtab.load_adapter(base, tmp_path / "adapter")
    assert trimtab.score_loss(base, held_out).loss == pytest.approx(after, abs=1e-4)
    assert any(torch.count_nonzero(parameter) for name, parameter in adapter.parameters().items() if name.endswith("B"))


def test_it_refuses_before_it_trains(script, words, tmp_path):
    with pytest.raises(SystemExit, match=r"--held-out: expected 1 to 29 of the 30 examples, got 30\."):
        script.main([*words, "--held-out", "30"])
    (tmp_path / "adapter").mkdir()
    with pytest.raises(SystemExit, match="adapter exists already: name a new folder with --output"):
        script.main(words)
    done = subprocess.run([sys.executable, SCRIPT, "--base", tmp_path / "none"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("train_loop: model: ")


@pytest.mark.parametrize("path", sorted(SCRIPT.parent.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short_and_uses_what_is_public(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") < 120
    for node in ast.walk(ast.parse(text)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            top, _, rest = name.partition(".")
            assert top in {*sys.stdlib_module_names, "datasets", "torch", "transformers", "trimtab", "trl"}
            assert top != "trimtab" or not rest
        if isinstance(node, ast.Attribute):
            assert not node.attr.startswith("_")
            if isinstance(node.value, ast.Name) and node.value.id == "trimtab":
                assert node.attr in trimtab.__all__
