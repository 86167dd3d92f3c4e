"""A file of prompts is answered in its order, whatever its format; an interrupted command goes on to the same file."""

import itertools
import json

import pytest
from templates import saved_base

import trimtab
from trimtab.cli import main
from trimtab.core.errors import DataError, RecipeError, StorageError
from trimtab.data import DataConfig
from trimtab.data.example import RejectedExample
from trimtab.deploy import load_model, save_adapter
from trimtab.evaluate.answers import BATCH
from trimtab.evaluate.prompts import prompt_source, prompts_of
from trimtab.methods import attach
from trimtab.methods.lora import LoRA
from trimtab.run.answering import answer_file, answering_from, check_prompts


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A tiny model, an adapter that changes its answers, and three batches of prompts."""
    root = tmp_path_factory.mktemp("answer")
    saved_base(root / "model")
    base = trimtab.load(str(root / "model"))
    adapter = attach(base.model, LoRA(rank=2))
    for number, parameter in enumerate(adapter.parameters().values()):
        parameter.data.fill_(0.05 * (number % 3 + 1))
    save_adapter(base, adapter, root / "adapter")
    write(root / "prompts.jsonl", [{"prompt": f"question {n} {'x' * (n % 7)}"} for n in range(2 * BATCH + 5)])
    return root


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def answered(target, source, output, *words, on_done=lambda _: None, **options):
    answering = answering_from(target.folder, str(source), ["eval.max_new_tokens=6", *words], **options)
    _, digest = check_prompts(target, answering)
    return answer_file(target, answering, output, digest, on_done)


@pytest.fixture(scope="module")
def target(work):
    return load_model(str(work / "adapter"))


def read(source, *words):
    config = DataConfig.parse({"train": str(source)}, list(words), "data:")
    return list(prompts_of(prompt_source(str(source), config)))


FORMATS = {
    "prompt": {"prompt": "hi"},
    "prompt and completion": {"prompt": "hi", "completion": "ho"},
    "a null completion": {"prompt": "hi", "completion": None},
    "messages": {"messages": [{"role": "user", "content": "hi"}]},
    "messages with the answer": {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
    "ShareGPT": {"conversations": [{"from": "human", "value": "hi"}]},
    "Gemini": {"contents": [{"role": "user", "parts": [{"text": "hi"}]}]},
    "Gemini with the answer": {"contents": [{"parts": [{"text": "hi"}]}, {"role": "model", "parts": [{"text": "ho"}]}]},
    "a call as the answer": {
        "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}]}]
    },
    "a prompt with documents": {"prompt": "hi", "contents": ["one", "two"]},
    "Alpaca": {"instruction": "hi", "input": ""},
    "Alpaca with an empty output": {"instruction": "hi", "output": ""},
    "a list of messages as the prompt": {"prompt": [{"role": "user", "content": "hi"}]},
    "text": {"text": "hi"},
    "a preference": {"prompt": "hi", "chosen": "good", "rejected": "bad"},
    "a preference of conversations": {
        "chosen": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}],
        "rejected": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "no"}],
    },
    "a judged answer": {"prompt": "hi", "completion": "ho", "label": True},
}
EXPECTED = {"prompt and completion", "messages with the answer", "Gemini with the answer", "a preference of conversations"}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_of_training_is_read_with_and_without_answers(name, tmp_path):
    (prompt,) = read(write(tmp_path / "p.jsonl", [FORMATS[name]]))
    assert [(m["role"], m["content"]) for m in prompt.example.messages] == [("user", "hi")]
    assert prompt.expected == ("ho" if name in EXPECTED else None)
    assert prompt.where.endswith("p.jsonl:1")


def test_conversations_columns_and_templates_are_read_as_in_training(tmp_path):
    talk = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user")]
    (whole,) = read(
        write(tmp_path / "a.jsonl", [{"messages": talk, "tools": [{"type": "function", "function": {"name": "f"}}]}])
    )
    assert list(whole.example.messages) == talk
    assert whole.example.tools
    file = write(tmp_path / "b.jsonl", [{"question": "why", "lang": "en"}])
    (named,) = read(file, "columns.prompt=question", "columns.completion=answer", "ignore=[lang]", "system=Be brief.")
    assert [m["content"] for m in named.example.messages] == ["Be brief.", "why"]
    (written,) = read(file, "prompt='{lang}: {question}'", "completion='{answer}'")
    assert written.example.messages[0]["content"] == "en: why"
    (tmp_path / "c.csv").write_text("prompt,completion\nhi,ho\n")
    assert read(tmp_path / "c.csv")[0].expected == "ho"


@pytest.mark.parametrize(("row", "words"), [
    ({"title": "x"}, "none of them is a prompt"), ({"prompt": ""}, "prompt is empty"), ({"prompt": 3}, "prompt is a number, not a text"),
    ({"messages": []}, "empty list"), ({"messages": [{"role": "assistant", "content": "x"}]}, "without a prompt"),
    ({"prompt": "x", "images": ["y"]}, "texts alone"), ({"messages": [{"role": "wizard", "content": "x"}]}, "is 'wizard'"),
])  # fmt: skip
def test_a_row_without_a_prompt_is_rejected_with_its_place(row, words, tmp_path):
    (found,) = read(write(tmp_path / "p.jsonl", [row]))
    assert isinstance(found, RejectedExample)
    assert found.where.endswith("p.jsonl:1")
    assert words in found.reason


def test_prompts_are_read_lazily(tmp_path):
    file = write(tmp_path / "p.jsonl", [{"prompt": str(n)} for n in range(1000)])
    with file.open("a") as more:
        more.write("not json\n")
    rows = prompts_of(prompt_source(str(file), DataConfig(train=(str(file),))))
    assert [prompt.example.messages[0]["content"] for prompt in itertools.islice(rows, 3)] == ["0", "1", "2"]


def test_each_prompt_has_the_answer_that_it_has_alone(work, target, tmp_path):
    answered(target, work / "prompts.jsonl", tmp_path / "out.jsonl", base=True)
    found = lines(tmp_path / "out.jsonl")
    assert [line["where"] for line in found] == [f"{work / 'prompts.jsonl'}:{n + 1}" for n in range(2 * BATCH + 5)]
    assert all(line["ended"] in ("stopped", "length") for line in found)
    assert any(line["answer"] != line["base"]["answer"] for line in found)
    for line in found[:3] + found[-2:]:
        assert line["answer"] == trimtab.answer(target.base, line["prompt"], max_new_tokens=6)
        with target.adapter.disabled():
            assert line["base"]["answer"] == trimtab.answer(target.base, line["prompt"], max_new_tokens=6)
    questions = [line["prompt"] for line in found]
    assert trimtab.answers(target.base, questions, max_new_tokens=6) == [line["answer"] for line in found]
    assert trimtab.answers(target.base, []) == []
    with pytest.raises(RecipeError):
        trimtab.answers(target.base, ["x" * 10_000])
    assert {path.name for path in tmp_path.iterdir()} == {"out.jsonl"}


@pytest.mark.parametrize("words", [(), ("eval.temperature=1.5", "eval.seed=3")], ids=["greedy", "sampled"])
@pytest.mark.parametrize("torn", [0, 1, 40], ids=["between batches", "within a line", "within a batch"])
def test_an_interrupted_file_goes_on_to_the_same_answers(work, target, tmp_path, words, torn):
    answered(target, work / "prompts.jsonl", tmp_path / "whole.jsonl", *words)

    calls = itertools.count()

    def interrupt(_):
        if next(calls) == 1:
            raise KeyboardInterrupt

    output = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt, match=r"32 answers are in .*out\.jsonl\.unfinished; the same command goes on"):
        answered(target, work / "prompts.jsonl", output, *words, on_done=interrupt)
    assert not output.exists()
    unfinished = tmp_path / "out.jsonl.unfinished"
    content = unfinished.read_bytes()
    rows = content.splitlines(keepends=True)
    unfinished.write_bytes(content if not torn else b"".join(rows[:-1]) + rows[-1][:-5] if torn == 1 else b"".join(rows[:20]))
    counts = answered(target, work / "prompts.jsonl", output, *words)
    assert counts.kept == {0: 32, 1: 31, 40: 20}[torn]
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    with pytest.raises(StorageError, match="exists already"):
        answered(target, work / "prompts.jsonl", output, *words)


def test_a_file_that_was_begun_otherwise_is_refused(work, target, tmp_path):
    def interrupt(_):
        raise KeyboardInterrupt

    output = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        answered(target, work / "prompts.jsonl", output, on_done=interrupt)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = write(tmp_path / "other.jsonl", [{"prompt": "else"}])
    for changed, words, options, source in (
        ("eval", ["eval.temperature=0.5"], {}, work / "prompts.jsonl"),
        ("base", [], {"base": True}, work / "prompts.jsonl"),
        ("prompts", [], {}, other),
    ):
        with pytest.raises(RecipeError, match=f"was begun with another {changed}: give the same command"):
            answered(target, source, output, *words, **options)
    adapter = load_model(str(work / "adapter"))
    next(iter(adapter.adapter.parameters().values())).data.add_(1)
    with pytest.raises(RecipeError, match="was begun with another adapter"):
        answered(adapter, work / "prompts.jsonl", output)
    assert before.items() <= {path.name: path.read_bytes() for path in tmp_path.iterdir()}.items()


def test_bad_rows_stop_before_the_first_answer_or_have_lines_that_say_why(work, target, tmp_path):
    rows = [{"prompt": "one"}, {"nothing": 1}, {"prompt": "<|im_end|>"}, {"prompt": "y" * 5000}, {"prompt": "two"}]
    file = write(tmp_path / "p.jsonl", rows)
    with file.open("a") as more:
        more.write('{"prompt": \n')
    with pytest.raises(
        DataError, match=r"(?s)p\.jsonl:2: has nothing.*p\.jsonl:3: .*control token.*p\.jsonl:4: .*5,0\d\d tokens.*:6"
    ) as stopped:
        answered(target, file, tmp_path / "out.jsonl")
    assert "data.bad_rows=skip" in str(stopped.value)
    assert not (tmp_path / "out.jsonl.unfinished").exists()
    counts = answered(target, file, tmp_path / "out.jsonl", "data.bad_rows=skip")
    found = lines(tmp_path / "out.jsonl")
    assert ["error" in line for line in found] == [False, True, True, True, False, True]
    assert (counts.prompts, counts.unusable) == (6, 4)
    assert found[4]["answer"] == trimtab.answer(target.base, "two", max_new_tokens=6)
    with pytest.raises(DataError, match="can't be answered"):
        answered(target, write(tmp_path / "q.jsonl", [{"nothing": 1}]), tmp_path / "q.out", "data.bad_rows=skip")


def test_the_command_says_what_it_did(work, tmp_path, capsys):
    file = write(tmp_path / "p.jsonl", [{"prompt": "one", "completion": "two"}, {"nothing": 1}])
    out = tmp_path / "out.jsonl"
    command = ["answer", str(work / "adapter"), "--data", str(file), "--output", str(out), "eval.max_new_tokens=1"]
    assert main(command) == 3
    assert "p.jsonl:2: has nothing" in capsys.readouterr().err
    assert main([*command, "--base", "data.bad_rows=skip"]) == 0
    said = capsys.readouterr().out
    assert f"1 answers are in {out}." in said
    assert "1 rows hold no prompt" in said
    assert "1 answers were cut off: raise eval.max_new_tokens (1)" in said
    line = lines(out)[0]
    assert line.keys() == {"where", "prompt", "expected", "answer", "ended", "base"}
    assert line["expected"] == "two"
    assert main(command) == 6
    for words, message in (
        (["eval.metrics=[rouge]"], "answer takes only"),
        (["train.lr=1"], "answer takes only"),
        (["eval.top_p=0.5"], "change nothing"),
    ):
        assert main([*command[:5], str(tmp_path / "new.jsonl"), *words]) == 2
        assert message in capsys.readouterr().err
    model = ["answer", str(work / "model"), "--data", str(file), "--output", str(tmp_path / "m.jsonl"), "data.bad_rows=skip"]
    assert main([*model, "--base"]) == 2
    assert main([*model, "eval.max_new_tokens=2"]) == 0


@pytest.mark.parametrize("left", ["out.jsonl.unfinished", "out.jsonl.settings.json"])
def test_a_command_that_died_before_its_first_answer_begins_again(work, target, tmp_path, left):
    (tmp_path / left).write_text('{"where": "half')
    answered(target, write(tmp_path / "p.jsonl", [{"prompt": "one"}]), tmp_path / "out.jsonl")
    assert [line["prompt"] for line in lines(tmp_path / "out.jsonl")] == ["one"]
    assert {path.name for path in tmp_path.iterdir()} == {"p.jsonl", "out.jsonl"}
