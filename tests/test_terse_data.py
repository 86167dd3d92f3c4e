"""The example of a preference: its rows are as its maker makes them, its answers right by themselves, its test new."""

import json
import runpy
from pathlib import Path

import pytest

from trimtab.run.recipe import Recipe

DEMO = Path(__file__).parents[1] / "demo" / "terse"
MAKER = runpy.run_path(str(DEMO / "make_data.py"))
ROWS = {
    name: [json.loads(line) for line in (DEMO / f"{name}.jsonl").read_text("utf-8").splitlines()] for name in ("train", "test")
}


@pytest.mark.parametrize("split", ROWS)
def test_the_files_are_what_the_maker_makes(split):
    made = dict(zip(("train", "test"), MAKER["make"](), strict=True))
    assert (DEMO / f"{split}.jsonl").read_text(encoding="utf-8") == MAKER["jsonl"](made[split])


def test_the_chosen_answer_is_said_in_the_rejected_one():
    for row in ROWS["train"] + ROWS["test"]:
        assert row["chosen"].rstrip(".").lower() in row["rejected"].lower()
        assert len(row["rejected"]) > 3 * len(row["chosen"])


def test_no_question_of_the_test_is_in_the_training_rows():
    asked = {split: [row["prompt"] for row in rows] for split, rows in ROWS.items()}
    assert len(set(asked["train"])) == MAKER["TRAIN_ROWS"]
    assert len(set(asked["test"])) == MAKER["SEEN_ROWS"] + MAKER["NEW_ROWS"]
    assert not set(asked["train"]) & set(asked["test"])
    new = ("colour", "chemical symbol", "is a young", "continent")
    assert not any(word in prompt for word in new for prompt in asked["train"])
    assert sum(any(word in prompt for word in new) for prompt in asked["test"]) == MAKER["NEW_ROWS"]


def test_the_recipe_is_one():
    recipe = Recipe.read(DEMO / "recipe.yaml")
    assert recipe.objective.name == "dpo"
    assert Path(recipe.data.train[0]) == Path("demo/terse/train.jsonl")
