"""`trimtab init`: from data in many shapes to a recipe that passes its checks and trains."""

import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from templates import CHATML, base_of, bytes_tokenizer

from trimtab import cli
from trimtab.run.recipe import Recipe

NUMBERS = range(8)
ASKED = [{"role": "user", "content": "Count."}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    base = base_of(bytes_tokenizer(("<|endoftext|>", "<|im_start|>", "<|im_end|>")), CHATML, eos_token="<|im_end|>")
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return str(folder)


def jsonl(folder, rows, name="data.jsonl"):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def table(folder, lines, name):
    (folder / name).write_text("\n".join(lines) + "\n")
    return name


def parquet(folder, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "data.parquet")
    return "data.parquet"


def nested(folder, rows):
    (folder / "data.json").write_text(json.dumps(rows, indent=1))
    return "data.json"


def split_folder(folder, rows):
    for split, part in (("train", rows[4:]), ("valid", rows[:2]), ("test", rows[2:4])):
        jsonl(folder, part, f"set/{split}.jsonl")
    return "set"


def beside(folder, rows):
    jsonl(folder, rows[:2], "x-valid.jsonl")
    return jsonl(folder, rows[2:], "x-train.jsonl")


def saved(folder, rows):
    parts = {"train": rows[2:], "validation": rows[:2]}
    datasets.DatasetDict({name: datasets.Dataset.from_list(part) for name, part in parts.items()}).save_to_disk(
        folder / "saved"
    )
    return "saved"


def rows(**columns):
    """Rows whose texts have their number in the place of #."""
    return [
        {
            name: json.loads(json.dumps(value).replace("#", str(n))) if value is not ... else n % 2 == 0
            for name, value in columns.items()
        }
        for n in NUMBERS
    ]


TURNS = [{"role": "user", "content": "Q#"}, {"role": "assistant", "content": "A#"}]
SHARED = [{"from": "human", "value": "Q#"}, {"from": "gpt", "value": "A#"}]
OTHER = {"from": "gpt", "value": "B#"}
CASES = {
    "openai": (lambda f: jsonl(f, rows(messages=TURNS)), "sft", {}),
    "sharegpt": (lambda f: jsonl(f, rows(conversations=SHARED, system="Be brief.")), "sft", {}),
    "alpaca": (lambda f: nested(f, rows(instruction="Q#", input="", output="A#")), "sft", {}),
    "alpaca with its text": (lambda f: nested(f, rows(instruction="Q#", output="A#", text="Q# A#")), "sft", {"ignore": ("text",)}),
    "belle": (lambda f: jsonl(f, rows(instruction="问#", input="", output="答#")), "sft", {}),
    "odd csv": (
        lambda f: table(f, ["Id,Question,Answer", *(f"{n},Q{n},A{n}" for n in NUMBERS)], "data.csv"),
        "sft",
        {"columns": {"prompt": "Question", "completion": "Answer"}},
    ),
    "tsv of two texts": (
        lambda f: table(f, ["english\tfrench", *(f"e{n}\tf{n}" for n in NUMBERS)], "data.tsv"),
        "sft",
        {"columns": {"prompt": "english", "completion": "french"}},
    ),
    "parquet": (
        lambda f: parquet(f, rows(query="Q#", response="A#")), "sft", {"columns": {"prompt": "query", "completion": "response"}}
    ),
    "prompt and completion": (lambda f: jsonl(f, rows(prompt="Q#", completion="A#")), "sft", {}),
    "pairs": (lambda f: jsonl(f, rows(prompt="Q#", chosen="A#", rejected="B#")), "dpo", {}),
    "pairs after turns": (lambda f: jsonl(f, rows(conversations=SHARED[:1], chosen=SHARED[1], rejected=OTHER)), "dpo", {}),
    "pairs of conversations": (
        lambda f: jsonl(f, rows(chosen=TURNS, rejected=[TURNS[0], {"role": "assistant", "content": "B#"}])), "dpo", {}
    ),
    "odd pairs": (
        lambda f: jsonl(f, rows(question="Q#", chosen="A#", rejected="B#")), "dpo", {"columns": {"prompt": "question"}}
    ),
    "judged": (lambda f: jsonl(f, rows(prompt="Q#", completion="A#", label=...)), "kto", {}),
    "classes": (
        lambda f: jsonl(f, [{"text": f"T{n}", "label": n % 3} for n in NUMBERS]), "sft", {"prompt": "{text}", "completion": "{label}"}
    ),
    "dolly": (
        lambda f: jsonl(f, rows(instruction="Q#", context="", response="A#", category="x")), "sft",
        {"prompt": "{instruction}\n\n{context}", "completion": "{response}"},
    ),
    "text": (lambda f: jsonl(f, rows(text="Once upon a time #.")), "sft", {}),
    "splits": (lambda f: split_folder(f, rows(prompt="Q#", completion="A#")), "sft", {"eval": "set/*valid*.jsonl"}),
    "splits beside": (lambda f: beside(f, rows(prompt="Q#", completion="A#")), "sft", {"eval": "x-valid.jsonl"}),
    "saved": (lambda f: saved(f, rows(prompt="Q#", completion="A#")), "sft", {"eval": {"validation": {"path": "saved", "split": "validation"}}}),
    "some unusable": (
        lambda f: jsonl(f, [*rows(prompt="Q#", completion="A#"), {"prompt": "Q", "completion": ""}]), "sft", {"bad_rows": "skip"}
    ),
    "repeated": (lambda f: jsonl(f, rows(prompt="Q#", completion="A#") * 2), "sft", {"duplicates": "remove"}),
    "one": (lambda f: jsonl(f, [{"prompt": "Q", "completion": "A"}]), "sft", {"eval": 0}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_recipe_passes_its_checks(case, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make, objective, keys = CASES[case]
    source = make(tmp_path)
    assert cli.main(["init", source, "--model", model, "--output", "new.yaml"]) == 0, capsys.readouterr().err
    assert "Wrote new.yaml. Next:\n  trimtab check new.yaml\n  trimtab train new.yaml\n" in capsys.readouterr().out
    recipe = Recipe.read(Path("new.yaml"))
    assert recipe.objective.name == objective
    found = recipe.data.model_dump(include={"columns", "ignore", "bad_rows", "duplicates", *keys}, exclude_defaults=True)
    assert found == keys
    assert cli.main(["check", "new.yaml"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("case", ["odd csv", "odd pairs", "judged", "saved"])
def test_the_recipe_trains(case, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source = CASES[case][0](tmp_path)
    assert cli.main(["init", source, "--model", model, "--output", "new.yaml"]) == 0
    assert cli.main(["train", "new.yaml", "certify=false", "train.epochs=1", "train.lr=1e-3"]) == 0, capsys.readouterr().err


def test_tools_thinking_and_what_was_inferred_are_said(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    thinking = [{"role": "system", "content": "S"}, *ASKED, {"role": "assistant", "content": "<think>Hm.</think>#"}]
    jsonl(tmp_path, rows(messages=thinking))
    assert cli.main(["init", "data.jsonl", "--model", model]) == 0
    said = capsys.readouterr().out
    assert "8 of 8 have a system message" in said
    assert "8 of 8 hold reasoning" in said
    assert "10% of them are held out" in said
    text = Path("data.yaml").read_text()
    assert "#   user: Count.\n" in text
    assert cli.main(["init", "data.jsonl", "--model", model]) == 2
    assert "data.yaml exists already, and is not overwritten. Give another name with --output." in capsys.readouterr().err
    assert Path("data.yaml").read_text() == text


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        ([{"a": 1, "b": 2, "c": 3}], 3, "nothing says what in it is to be trained on. It has the columns a, b, c"),
        ([{"messages": [{"role": "user", "content": "Q"}]}], 3, "no message is the assistant's"),
        (
            rows(messages=TURNS, tools=[{"type": "function", "function": {"name": "f"}}]),
            3,
            "the model's chat template leaves out tools",
        ),
        (None, 3, "no such file or folder"),
    ],
)
def test_what_it_cannot_read_is_said(content, code, message, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        jsonl(tmp_path, content)
    assert cli.main(["init", "data.jsonl", "--model", model]) == code
    assert message in capsys.readouterr().err
    assert not Path("data.yaml").exists()
