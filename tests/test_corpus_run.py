"""Runs on a corpus: the steps are made from their numbers, and a run that was killed ends as one that was not."""

import json
import math
import random
import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import transformers
from templates import CORPUS
from worlds import command, make_model, work_in_copy

from trimtab.base import Base
from trimtab.core.errors import RecipeError
from trimtab.data import DataConfig, corpus_tokens, load_data
from trimtab.report import RunObserver
from trimtab.run.recipe import Recipe
from trimtab.run.script import run_recipe
from trimtab.train import TrainConfig, memory_of, steps_of

WORDS = " ".join(CORPUS).split()
RECIPE = """\
model: tiny
data: {train: texts, corpus: true, max_length: 48, eval: 4}
method: {name: lora, rank: 2, dropout: 0.1}
train: {max_steps: 9, rows_per_step: 3, lr: 1e-2, evaluate_every: 3, save_every: 2, schedule: linear}
output: run
certify: false
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    transformers.utils.logging.disable_progress_bar()
    make_model(folder / "tiny", 0)
    make_model(folder / "other", 1)
    (folder / "texts").mkdir()
    draw = random.Random(0)
    for number in range(3):
        lines = (json.dumps({"text": " ".join(draw.choices(WORDS, k=draw.randint(2, 40)))}) for _ in range(40))
        (folder / "texts" / f"{number}.jsonl").write_text("\n".join(lines))
    (folder / "r.yaml").write_text(RECIPE)
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_tokens, "SHARD_TOKENS", 1000)
    return work_in_copy(made, tmp_path, monkeypatch)


class Killed(BaseException):
    """Nothing that a run would catch and tidy up after."""


class Ends(RunObserver):
    def __init__(self, step):
        self.step = step

    def logged(self, kind, step, values):
        if kind == "train" and step == self.step:
            raise Killed


def run(*words, watch=None):
    return run_recipe(Recipe.read(Path("r.yaml"), words), watch)


def result(folder):
    metrics = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    log = [{key: value for key, value in line.items() if key not in ("seconds", "took")} for line in metrics]
    (weights,) = (Path(folder) / "adapter").glob("*.safetensors")
    return log, weights.read_bytes(), json.loads((Path(folder) / "losses.json").read_text())


@pytest.mark.parametrize(
    "words", [(), ("train.epochs=1", "train.tokens_per_step=96", "train.rows_per_step=null", "method.name=full")]
)
def test_a_run_that_was_killed_has_the_same_losses(here, words):
    words = [word for word in words if not word.startswith("method")] + (["method={name: full}"] if words else [])
    run("output=whole", *words)
    for step in (3, 4, 8):
        with pytest.raises(Killed):
            run("output=cut", *words, watch=Ends(step))
    run("output=cut", *words)
    assert result("cut") == result("whole")
    log, *_ = result("whole")
    assert [line["step"] for line in log if line["kind"] == "train"] == list(range(1, 10))
    assert log[-1]["loss"] < log[0]["loss"]


def test_the_command_checks_trains_evaluates_and_certifies(here):
    done = command("train", "r.yaml", "certify=true", "train.max_steps=3", cwd=here)
    assert (done.returncode, done.stderr) == (0, "")
    assert "certificate passed" in done.stdout
    done = command("check", "r.yaml", "--json", cwd=here)
    findings = {finding["name"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert findings["duplicates"]["words"] == "documents that are there twice are not searched for in a corpus"
    assert "blocks of 48 tokens" in findings["tokens"]["words"]
    done = command("eval", "run", "--json", cwd=here)
    measured = json.loads(done.stdout)
    best = json.loads((here / "run" / "run.json").read_text())["best"]
    assert done.returncode == 0, done.stderr
    assert best["eval_loss"] == pytest.approx(measured["loss"], rel=1e-5)


def test_another_file_or_model_is_not_gone_on_with(here):
    with pytest.raises(Killed):
        run(watch=Ends(5))
    shutil.copy("texts/0.jsonl", "kept")
    with open("texts/0.jsonl", "a") as file:
        file.write('\n{"text": "more"}')
    with pytest.raises(RecipeError, match=r"the training or held-out examples are not the same: .*texts/0.jsonl has changed"):
        run()
    shutil.copy("kept", "texts/0.jsonl")
    with pytest.raises(RecipeError, match="it is another base model"):
        run("model=other")
    with pytest.raises(RecipeError, match="data"):
        run("data.max_length=64")
    run()


def test_other_processes_of_a_run_find_the_corpus(here):
    """A corpus is made under the lock of its folder, and read without it."""
    for name in ("one", "two"):
        run(f"output={name}", "train.max_steps=3")
    assert result("one") == result("two")


@pytest.mark.parametrize(
    "settings",
    [
        {"epochs": 1, "rows_per_step": 4}, {"epochs": 2.5, "rows_per_step": 7}, {"epochs": 1, "tokens_per_step": 200},
        {"epochs": 1, "tokens_per_step": 10}, {"max_steps": 5, "rows_per_step": 3}, {"epochs": 3, "max_steps": 4, "rows_per_step": 2},
        {"epochs": 1, "max_steps": 10_000, "rows_per_step": 2}, {},
    ],
)  # fmt: skip
def test_steps_are_the_blocks_of_training_in_their_order(here, settings):
    base = Base.load("tiny")
    data = load_data(DataConfig(train="texts", corpus=True, max_length=48, eval=2), base, 128, 0)
    config = TrainConfig(lr=1e-3, **settings)
    steps, corpus = steps_of(data, config, memory_of(base, config, data)), data.corpus
    epochs, rows = config.epochs_and_rows(len(corpus))
    per_step = rows or max(1, config.tokens_per_step // 48)
    blocks = math.ceil(round(epochs * len(corpus), 9))
    if config.max_steps is not None:
        most = config.max_steps * per_step
        blocks = most if config.epochs == "auto" else min(blocks, most)
    order = [block for first in range(0, blocks, per_step) for block in range(first, min(first + per_step, blocks))]
    expected = [[corpus.rows(n) for n in order[at : at + per_step]] for at in range(0, len(order), per_step)]
    assert len(steps) == len(expected)
    for number, of_blocks in enumerate(expected):
        packs = steps[number]
        assert Counter(str(row) for pack in packs for row in pack.rows) == Counter(
            str(row) for rows in of_blocks for row in rows
        )
        assert all(len(pack.ids) <= steps.memory.pack_tokens for pack in packs)
        assert all(parent == -1 for pack in packs for _, _, parent in pack.segments)
    ends = [steps.epoch_after(number) for number in range(1, len(steps) + 1)]
    assert all(a < b for a, b in pairwise(ends))
    assert ends[-1] == pytest.approx(steps.epochs, abs=1e-4) == pytest.approx(blocks / len(corpus), abs=1e-4)
    assert steps.rows_per_step == per_step


def test_no_step_takes_more_memory_than_the_planned_one(here):
    base = Base.load("tiny")
    data = load_data(DataConfig(train="texts", corpus=True, max_length=48, eval=0), base, 128, 0)
    config = TrainConfig(lr=1e-3, rows_per_step=3, epochs=1)
    memory = memory_of(base, config, data)
    (_, cost), *_ = memory.costs
    steps = steps_of(data, config, memory)
    largest = max(cost.bytes_of(len(pack.ids), sum(pack.pairs)) for n in range(len(steps)) for pack in steps[n])
    assert largest <= memory.peak_bytes
