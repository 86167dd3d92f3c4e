"""Odd columns as prompt and completion, system messages of the recipe's, and switches of the chat template by example."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from chat_templates import NAMES, TAUGHT, base, row
from templates import base_of, bytes_tokenizer

from trimtab import api, cli
from trimtab.base.template_file import read_template
from trimtab.core.errors import RecipeError
from trimtab.data import (
    DataConfig,
    SourceReport,
    Text,
    check_data,
    load_data,
    load_examples,
    tokenize_answers,
    tokenize_examples,
    tokenize_prompt,
)
from trimtab.data.formats import read_examples
from trimtab.data.load import LoadedData
from trimtab.data.preference_formats import FORMATS
from trimtab.data.system_message import SystemMessage, check_system
from trimtab.run.recipe import Recipe
from trimtab.run.script import run_recipe
from trimtab.testing import tiny_base


def read(raw, *, kind="answers", **reading):
    report = SourceReport(("rows",))
    examples = list(read_examples([("rows:1", raw)], reading.pop("columns", {}), report, FORMATS[kind], **reading))
    return examples, report, [reason for _, reason in report.rejected]


def tokens(raw, on, **reading):
    examples, report, _ = read(raw, **reading)
    return examples, tokenize_examples(examples, on, report), [reason for _, reason in report.rejected]


def said(raw, prompt="{a}", completion="{b}", **reading):
    """Prompt and completion that the templates write, or the first reason why not."""
    examples, _, refused = read(raw, templates={"prompt": prompt, "completion": completion}, **reading)
    return refused[0] if refused else tuple(message["content"] for message in examples[0].messages)


# Templates over columns


@pytest.mark.parametrize(
    ("raw", "prompt", "expected"),
    [
        ({"a": "x", "b": "y"}, "Say {a}!", "Say x!"),
        ({"a": 3, "b": "y"}, "{a}", "3"),
        ({"a": True, "b": "y"}, "{a}", "true"),
        ({"a": 0.5, "b": "y"}, "{a}", "0.5"),
        ({"a": ["ü", "x"], "b": "y"}, "{a}", '["ü", "x"]'),
        ({"a": {"k": 1}, "b": "y"}, '{{"all": {a}}}', '{"all": {"k": 1}}'),
        ({"a": "{b}", "b": "y"}, "{a}", "{b}"),
        ({"a": "x", "c": "", "b": "y"}, "{a}, {c}", "x, "),
        ({"meta.a b": "x", "b": "y"}, "{meta.a b}", "x"),
    ],
)
def test_a_template_writes_a_columns_value(raw, prompt, expected):
    assert said(raw, prompt) == (expected, "y")


@pytest.mark.parametrize(
    ("raw", "prompt", "reason"),
    [
        ({"b": "y", "A ": "x"}, "{a}", "no column 'a' (is it 'A '?)"),
        ({"a": None, "b": "y"}, "{a}", "column 'a' is null"),
        ({"a": " ", "b": "y"}, "Say {a}!", "every column that it reads is empty (a)"),
        ({"a": "x", "b": "y"}, "{a.b}", "without attributes, indices or formats"),
        ({"a": "x", "b": "y"}, "{a[0]}", "without attributes, indices or formats"),
        ({"a": "x", "b": "y"}, "{a!r}", "without attributes, indices or formats"),
        ({"a": "x", "b": "y"}, "{a:>9}", "without attributes, indices or formats"),
        ({"a": "x", "b": "y"}, "{0}", "no column '0'"),
        ({"a": float("nan"), "b": "y"}, "{a}", "JSON can't write"),
        ({"a": b"x", "b": "y"}, "{a}", "holds bytes"),
        ({"a": [{"role": "user", "content": "x"}], "b": "y"}, "{a}", "is a list of messages"),
        ({"a": "x", "b": "y", "prompt": "z"}, "{a}", "has a column prompt, in whose place data.prompt writes another"),
        ({"a": "x", "b": "y", "history": [["q", "a"]]}, "{a}", "has history, which examples with prompt/completion don't use"),
    ],
)
def test_a_template_refuses_what_it_cannot_write(raw, prompt, reason):
    assert reason in said(raw, prompt)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({"prompt": "{a"}, "data.prompt: the brace { at character 1 is alone: write {{"),
        ({"prompt": "a} {b}"}, "the brace } at character 2 is alone"),
        ({"prompt": "{} {b}"}, "{} names no column"),
        ({"prompt": "source"}, "has no column in braces"),
        ({"prompt": {"source": None}}, "write '{source}' in quotes"),
        ({"prompt": "{a}", "columns": {"prompt": "a"}}, "both say what the prompt is"),
        ({"prompt": "{a}", "ignore": ["a"]}, "data.ignore leaves out a, which data.prompt reads"),
        ({"train": {"one": {"path": "x", "columns": {"prompt": "q"}}}, "prompt": "{a}"}, "both say what the prompt is"),
    ],
)
def test_a_recipe_with_a_wrong_template_is_refused(data, reason):
    with pytest.raises(RecipeError) as refused:
        DataConfig.parse({"train": "x", **data}, where="data")
    assert reason in str(refused.value).replace("data prompt", "data.prompt")


def test_templates_read_csv_json_and_parquet_alike(tmp_path):
    rows = [{"Q": "One?", "n": 1, "A": "First."}, {"Q": "Two?", "n": 2, "A": "Second."}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.csv").write_text("Q,n,A\nOne?,1,First.\nTwo?,2,Second.\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for ending in ("json", "csv", "parquet"):
        examples, report = load_examples(str(tmp_path / f"a.{ending}"), prompt="{n}. {Q}", completion="{A}")
        assert [example.messages[0]["content"] for example in examples] == ["1. One?", "2. Two?"]
        assert report.ignored_columns == set()
    report = load_examples(str(tmp_path / "a.csv"), prompt="{Q}", completion="{A}")[1]
    assert report.ignored_columns == {"n"}


def test_templates_write_prompts_of_preferences():
    raw = {"q": "One?", "chosen": "Yes.", "rejected": "No."}
    (pair,), _, refused = read(raw, kind="pairs", templates={"prompt": "Say: {q}"})
    assert (refused, pair.chosen.messages[0]["content"]) == ([], "Say: One?")
    refused = read(raw, kind="pairs", templates={"prompt": "{q}", "completion": "{chosen}"})[2]
    assert "this objective has no such format" in refused[0]
    (judged,), _, refused = read({"q": "One?", "completion": "Yes.", "label": True}, kind="judged", templates={"prompt": "{q}"})
    assert (refused, judged.good) == ([], True)


# System messages

TALK = [{"role": "system", "content": "Own."}, {"role": "user", "content": "One?"}, {"role": "assistant", "content": "First."}]


@pytest.mark.parametrize(
    ("messages", "system", "expected"),
    [
        (TALK[1:], SystemMessage("New."), "New."),
        (TALK, SystemMessage("New."), "Own."),
        (TALK, SystemMessage("New.", True), "New."),
        (TALK, SystemMessage(None, True), None),
    ],
)
def test_system_messages_are_added_replaced_and_left_out(messages, system, expected):
    earlier = [{"role": "user", "content": "Zero?"}, {"role": "assistant", "content": "No.", "weight": 0}]
    messages = [*messages[:-2], *earlier, *messages[-2:]]
    (example,), _, _ = read({"messages": messages}, system=system)
    texts = [message["content"] for message in example.messages if message["role"] == "system"]
    assert texts == ([expected] if expected else [])
    assert [example.messages[n]["content"] for n in example.weights] == ["No."]
    written = [{"role": "system", "content": expected}] if expected else []
    (same,), _, _ = read({"messages": [*written, *earlier, *TALK[1:]]})
    assert tokens({"messages": messages}, base("qwen2_5"), system=system)[1] == tokenize_examples(
        [same], base("qwen2_5"), SourceReport(())
    )


def test_both_answers_of_a_pair_have_the_system_message():
    (pair,), _, _ = read({"prompt": "q", "chosen": "a", "rejected": "b"}, kind="pairs", system=SystemMessage("New."))
    assert [side.messages[0]["content"] for side in (pair.chosen, pair.rejected)] == ["New.", "New."]


def test_a_plain_text_has_no_system_message():
    assert "data.system is for conversations alone" in read({"text": "Once."}, system=SystemMessage("New."))[2][0]
    assert isinstance(read({"text": "Once."}, system=SystemMessage(None, True))[0][0], Text)


@pytest.mark.parametrize("name", NAMES)
def test_data_system_is_refused_by_templates_without_one(name):
    if TAUGHT[name].system is None:
        check_system("Be brief.", base(name))
        return
    with pytest.raises(RecipeError, match=r"data\.system: .*System role not supported"):
        check_system("Be brief.", base(name))


def test_data_system_is_refused_where_it_would_be_lost(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "q", "completion": "a"}))
    config = DataConfig(train=str(tmp_path / "a.jsonl"), eval=0, system="Be brief.")
    silent = base_of(
        bytes_tokenizer(("<e>",)),
        "{% for m in messages if m.role != 'system' %}{{ m.content }}<e>{% endfor %}",
        eos_token="<e>",
    )
    with pytest.raises(RecipeError, match="leaves the system message out"):
        load_data(config, silent, None, 0)
    with pytest.raises(RecipeError, match="has no chat template"):
        load_data(config, base_of(bytes_tokenizer(("<e>",)), None, eos_token="<e>"), None, 0)


def test_chat_begins_with_the_system_message_that_was_trained_with(tmp_path, monkeypatch, capsys):
    tiny_base().model.save_pretrained(tmp_path / "tiny")
    tiny_base().tokenizer.save_pretrained(tmp_path / "tiny")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"prompt": f"q{n}", "completion": "a"}) + "\n" for n in range(4)))
    run = tmp_path / "run"
    raw = {"model": str(tmp_path / "tiny"), "data": {"train": str(tmp_path / "a.jsonl"), "eval": 0, "system": "Be brief."}}
    run_recipe(Recipe.parse({**raw, "output": str(run), "certify": False, "train": {"epochs": 1, "lr": 1e-3}}))
    asked = []
    monkeypatch.setattr(api, "_prompt", lambda base, messages: asked.append(messages) or [1, 2])
    user = {"role": "user", "content": "q"}
    for words, system in (((), "Be brief."), (("--system", "Other."), "Other."), (("--system", ""), None)):
        assert cli.main(["chat", str(run), "--prompt", "q", "--max-new-tokens", "1", *words]) == 0
        assert asked.pop() == ([{"role": "system", "content": system}] if system else []) + [user]
        assert ("with the run's system message" in capsys.readouterr().err) == (not words)


# Switches by example


SWITCHED = [name for name in NAMES if "enable_thinking" in base(name).template.switch_names]


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("name", SWITCHED)
def test_an_examples_switch_is_the_models_for_this_example(name, value):
    on, plain, asked = base(name), row("single"), {"chat_template_kwargs": {"enable_thinking": value}}
    examples, rows, refused = tokens({**plain, **asked}, on)
    assert refused == []
    assert rows == tokens(plain, base(name, enable_thinking=value))[1]
    assert rows != tokens({**plain, "chat_template_kwargs": {"enable_thinking": not value}}, on)[1]
    prompt, answer = tokenize_answers(examples, on)[0]
    assert prompt + answer == rows[0].ids
    assert prompt == tokenize_prompt(examples[0].messages[:-1], on, (), examples[0].switches)
    theirs = on.tokenizer.apply_chat_template(
        plain["messages"][:1], tokenize=False, add_generation_prompt=True, enable_thinking=value
    )
    assert on.tokenizer.decode(prompt) == theirs
    assert on.answer_text(on.raw_text(answer)) == "First."
    (finding,) = [one for one in check_data(LoadedData(rows, [], [], ""), examples, on) if one.name == "rendering"]
    assert finding.status == "good"


@pytest.mark.parametrize(
    ("name", "switches"),
    [
        ("gptoss", {"reasoning_effort": "high"}),
        ("qwen3_8", {"reasoning_effort": "low"}),
        ("llama3_1", {"date_string": "1 May 2031"}),
    ],
)
def test_switches_that_are_texts(name, switches):
    _, rows, refused = tokens({**row("single"), "chat_template_kwargs": json.dumps(switches)}, base(name))
    assert refused == []
    assert rows == tokens(row("single"), base(name, **switches))[1]


def test_examples_with_and_without_thinking_stand_side_by_side_and_the_template_is_probed_once_each():
    on, template = base("qwen3_5_nothink"), base("qwen3_5_nothink").template
    first = template.with_switches({"enable_thinking": True})
    assert template.with_switches({"enable_thinking": True}) is first is not template.with_switches({"enable_thinking": False})
    assert template.with_switches({}) is template
    reasoned = row("reasoning_content")
    assert "set model.template.enable_thinking=true" in tokens(reasoned, on)[2][0]
    assert tokens({**reasoned, "chat_template_kwargs": {"enable_thinking": True}}, on)[2] == []
    advice = tokens({**reasoned, "chat_template_kwargs": {"enable_thinking": False}}, on)[2][0]
    assert "set chat_template_kwargs={enable_thinking: true}" in advice


@pytest.mark.parametrize(
    ("switches", "reason"),
    [
        ({"thinking": True}, "chat_template_kwargs.thinking: the chat template does not read it: it reads enable_thinking"),
        ({"tokenize": True}, "chat_template_kwargs.tokenize: the chat template does not read it"),
        ({"messages": []}, "chat_template_kwargs.messages: the chat template does not read it"),
        ([True], "chat_template_kwargs is a list, not an object"),
        ("{", "chat_template_kwargs: not valid JSON"),
    ],
)
def test_switches_that_nothing_reads_are_refused(switches, reason):
    assert reason in tokens({**row("single"), "chat_template_kwargs": switches}, base("qwen3"))[2][0]


def test_null_switches_are_none_and_a_column_of_a_switchs_name_is_not_lost():
    assert tokens({**row("single"), "chat_template_kwargs": {"enable_thinking": None}}, base("qwen3"))[0][0].switches == {}
    assert "into a column chat_template_kwargs" in read({**row("single"), "enable_thinking": False})[2][0]
    no_template = base_of(bytes_tokenizer(("<e>",)), None, eos_token="<e>")
    raw = {"prompt": "q", "completion": "a", "chat_template_kwargs": {"enable_thinking": False}}
    assert "this model has no chat template" in tokens(raw, no_template)[2][0]


def test_pairs_have_switches_too():
    raw = {"prompt": "q", "chosen": "a", "rejected": "b", "chat_template_kwargs": {"enable_thinking": False}}
    examples, rows, refused = tokens(raw, base("qwen3"), kind="pairs")
    assert refused == []
    assert examples[0].chosen.switches == examples[0].rejected.switches == {"enable_thinking": False}
    assert rows == tokens({**raw, "chat_template_kwargs": None}, base("qwen3", enable_thinking=False), kind="pairs")[1]


# A chat template of the user's


@pytest.mark.parametrize("name", ["a.jinja", "tokenizer_config.json", "chat_template.json"])
def test_a_template_of_the_users_is_read_from_what_people_have(name, tmp_path):
    source = base("qwen3").tokenizer.chat_template
    base("qwen3").tokenizer.save_pretrained(tmp_path / "saved")
    file = tmp_path / name
    file.write_text(source if name == "a.jinja" else json.dumps({"chat_template": source, "eos_token": "<|im_end|>"}))
    assert read_template(file) == read_template(tmp_path / "saved" / "chat_template.jinja") == source


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.json", {"chat_template": [{"name": "default"}, {"name": "tool_use", "template": "y"}]}, "has no chat_template"),
        (
            "a.json",
            {"chat_template": {"default": "x", "rag": "{% if %}"}},
            "a.json: rag is not a Jinja template that can be parsed",
        ),
        ("a.json", {"chat_template": []}, "has no chat_template"),
        ("a.json", {"eos_token": "x"}, "has no chat_template"),
        ("a.json", [1], "has no chat_template"),
        ("a.json", {"chat_template": "{% if %}"}, "is not a Jinja template that can be parsed"),
        ("a.json", None, "is not valid JSON"),
        ("a.jinja", None, "is not a Jinja template that can be parsed"),
    ],
)
def test_what_holds_no_template_is_refused(name, content, reason, tmp_path):
    (tmp_path / name).write_text("{% if %}" if content is None else json.dumps(content))
    with pytest.raises(RecipeError) as refused:
        read_template(tmp_path / name)
    assert reason in str(refused.value)
