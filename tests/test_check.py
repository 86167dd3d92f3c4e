"""The data's proof: every way in which training would be meaningless is seen before it starts, and said with a row's place."""

import json
import random
import re
import shutil
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
import transformers
from pages import problems
from worlds import CHATML, ROWS, make_model, write_rows

from trimtab.core.errors import DataError, TrimtabError
from trimtab.data import check_data, checks, refuse_problems
from trimtab.data import leakage as module_of_leaks
from trimtab.data.example import TokenRow
from trimtab.data.leakage import find_leaks
from trimtab.engine import memory_plan as planning
from trimtab.run import preflight as before
from trimtab.run.preflight import preflight
from trimtab.run.recipe import Recipe
from trimtab.run.start import open_recipe

pytestmark = pytest.mark.usefixtures("one_thread")


def findings(*words):
    given = open_recipe(Recipe.read(Path("r.yaml"), list(words)))
    return {one.name: one for one in preflight(given)}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.train=row.jsonl"], "data: row.jsonl: no such file or folder (looked in HERE; did you mean rows.jsonl?)."),
        (["data.eval=rows.json"], "data: rows.json: no such file or folder (looked in HERE; did you mean rows.jsonl?)."),
        (["data.eval=nothing.jsonl"], "data: nothing.jsonl: no such file or folder (looked in HERE)."),
        (["data.train=odd.csv"],
         "data: none of the first 20 examples of odd.csv can be used:\n  odd.csv:2 and 19 more: has Frage, Antwort, which matches no supported "
         "format (messages; conversations; contents; instruction, output; prompt, completion; text). Name them with data.columns, "
         "e.g. data.columns.prompt=Frage data.columns.completion=Antwort"),
        (["objective=dpo"],
         "data: none of the first 20 examples of rows.jsonl can be used:\n  rows.jsonl:1 and 19 more: column 'chosen' is missing beside "
         "prompt; the example has prompt, completion"),
        (["model=./tino"], "model: ./tino: no such file or folder (looked in HERE; did you mean tiny?). A model is a local "),
    ],
)  # fmt: skip
def test_cheap_mistakes_are_seen_before_the_model_is_loaded(words, message, here, monkeypatch):
    (here / "odd.csv").write_text("Frage;Antwort\n" + "Was ist das?;Eine Zahl\n" * 40)
    monkeypatch.setattr(before.Base, "load", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(TrimtabError) as caught:
        findings(*words)
    assert str(caught.value).replace(str(here), "HERE").startswith(message)


def test_a_file_some_of_whose_first_rows_can_be_used_is_read_whole_before_it_is_refused(here, trimtab):
    write_rows(here / "rows.jsonl", [*ROWS[:19], *({"prompt": "a", "completion": ""} for _ in range(3)), *ROWS[19:]])
    assert "rows.jsonl:20 and 2 more: completion is empty" in trimtab("check", "r.yaml").err


def test_of_good_rows_everything_is_good(here, trimtab):
    write_rows(here / "rows.jsonl", [{**row, "completion": f"yes, {n}"} for n, row in enumerate(ROWS)])
    done = trimtab("check", "r.yaml", "--json")
    assert done.code == 0
    said = json.loads(done.out)
    assert {one["name"]: one["status"] for one in said["findings"]} == {
        "rows": "good", "tokens": "good", "stop tokens": "good", "rendering": "good", "duplicates": "good", "held out": "good",
        "answers": "good", "special tokens": "good", "capacity": "good", "layers": "good", "disk": "good", "memory": "good",
    }  # fmt: skip
    facts = {one["name"]: one["facts"] for one in said["findings"]}
    assert facts["rows"]["rows"] == facts["rows"]["used"] == 30
    assert sum(facts["tokens"]["histogram"].values()) == 26
    assert facts["stop tokens"] == {"share": 1.0, "open_ended": []}
    assert facts["rendering"]["compared"] == 30
    (kind,) = facts["layers"]
    assert kind.startswith("LlamaDecoderLayer: ")
    assert facts["layers"][kind] == 2 or "own code" in kind
    row = said["rows"][0]
    learned = "".join(part["text"] for part in row["parts"] if part["learned"])
    assert learned.startswith("yes, ")
    assert learned.endswith("<|im_end|>")
    whole = "".join(part["text"] for part in row["parts"])
    assert whole.startswith("<|im_start|>user\nIs ")
    assert len(said["rows"]) in (3, 4, 5)


def test_the_terminal_shows_what_is_learned_and_so_does_the_page(here, trimtab):
    write_rows(here / "rows.jsonl", [{"prompt": f"Is {n} < 7 & so on?", "completion": f"<b>yes</b> {n}"} for n in range(30)])
    done = trimtab("check", "r.yaml", "--html", "proof.html", "--show", "1")
    assert done.code == 0
    said = done.out.splitlines()
    assert said[0].endswith("rows.jsonl:1")
    assert said[1:5] == [  # what is learned is marked by a word, where there are no colours
        "       | <|im_start|>user", f"       | {said[2][9:]}", "       | <|im_start|>assistant", f"target | {said[4][9:]}",
    ]  # fmt: skip
    assert re.fullmatch(r"Is \d+ < 7 & so on\?<\|im_end\|>", said[2][9:])
    assert re.fullmatch(r"<b>yes</b> \d+<\|im_end\|>", said[4][9:])
    assert said[-1] == "Ready to train: all 12 checks are good."
    page = (here / "proof.html").read_text()
    assert problems(page) == []
    assert "可以开始训练：12 项检查全部正常。" in page
    assert "<mark>&lt;b&gt;yes&lt;/b&gt;" in page
    assert "&lt; 7 &amp; so on?" in page
    assert page.count("<pre>") in (2, 3)
    assert said[-1] in page
    assert "r.yaml · " in page
    assert f"{datetime.now():%Y-%m-%d}" in page
    assert "prefers-color-scheme: dark" in page
    assert "rank: " in page  # the whole recipe
    assert not (here / "new").exists()


def test_rows_that_are_cut_are_counted_and_if_all_are_it_is_refused(here, trimtab):
    words = ("check", "r.yaml", "data.overlong=truncate")
    write_rows(here / "rows.jsonl", [{"prompt": "Say it.", "completion": "yes " * (1 if n else 90)} for n in range(30)])
    some = findings("data.overlong=truncate", "data.max_length=60", "data.eval=0")["stop tokens"]
    assert some.status == "note"
    assert (
        some.message.startswith("1 of 30 examples do not end with a stop token (the first: rows.jsonl:1)")
        or "rows.jsonl:1" in some.message
    )
    write_rows(here / "rows.jsonl", [{"prompt": f"Say {n}.", "completion": "yes " * 90} for n in range(30)])
    done = trimtab(*words, "data.max_length=60")
    assert done.code == 3
    assert "30 of 30" in done.err or "26 of 26" in done.err
    assert "would never learn to stop. Raise data.max_length." in done.err
    done = trimtab("train", "r.yaml", "output=new", "data.overlong=truncate", "data.max_length=60")
    assert done.code == 3
    assert not (here / "new").exists()


def test_duplicates_and_leaks_are_named(here, trimtab):
    unlike = [{"prompt": f"Is {n} a number?", "completion": f"yes, {n}"} for n in range(20)]
    write_rows(here / "rows.jsonl", unlike + unlike[:3])
    found = findings("data.eval=0")
    assert found["duplicates"].facts["rows"] == 3
    assert found["duplicates"].status == "note"
    assert found["held out"].status == "note"
    write_rows(here / "held.jsonl", [unlike[4], {**unlike[5], "completion": "no"}, {"prompt": "New?", "completion": "yes"}])
    write_rows(here / "rows.jsonl", unlike)
    found = findings("data.eval=held.jsonl")["held out"]
    assert (len(found.facts["learned_too"]), len(found.facts["prompt_learned"]), found.status) == (1, 2, "note")
    write_rows(here / "held.jsonl", unlike[:5])
    done = trimtab("check", "r.yaml", "data.eval=held.jsonl")
    assert done.code == 3
    assert "all 5 validation examples are trained on as well" in done.err


def test_held_out_rows_that_are_nearly_learned_are_named():
    draw = random.Random(0)
    template = [draw.randrange(300) for _ in range(600)]  # most of every row, and no reason to call two alike

    def row(where, ids):
        return TokenRow(
            template + ids, list(range(len(template) + 20, len(template) + len(ids))), where, len(template) + len(ids)
        )

    texts = [[draw.randrange(300) for _ in range(draw.randrange(60, 80))] for _ in range(60)]
    rows = [row(f"rows:{n}", text) for n, text in enumerate(texts[:50])]
    held = [row(f"held:{n}", text) for n, text in enumerate(texts[50:])]  # of another text, in the same template
    assert find_leaks(rows, held).near == []
    edited = [*texts[7][:3], 301, *texts[7][4:]]
    cut = texts[8][6:56]
    half = [*texts[50][:20], *texts[9][20:60]]
    held += [row("edited", edited), row("cut", cut), row("half", half)]
    assert find_leaks(rows, held).near == [("edited", "rows:7"), ("cut", "rows:8")]
    found = find_leaks(rows, [*held, row("same", texts[3]), row("asked", [*texts[4][:20], 5, 6])])
    assert (found.exact, found.prompts, len(found.near)) == (["same"], ["same", "asked"], 2)
    assert find_leaks(rows[:3], []).near == find_leaks([], held).near == []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module_of_leaks, "BATCH", 700)
        assert find_leaks(rows, held).near == [("edited", "rows:7"), ("cut", "rows:8")]


def test_rows_that_do_not_fit_into_memory_are_a_problem(here, trimtab, monkeypatch):
    monkeypatch.setattr(planning, "free_memory", lambda device: 100_000.0)
    done = trimtab("check", "r.yaml")
    assert done.code == 3
    assert "memory: A micro-batch of" in done.err
    assert "Lower data.max_length" in done.err


def test_a_note_says_how_many_are_nearly_learned(here, trimtab):
    texts = ["".join(random.Random(n).choices("abcdefghijklmnop", k=40)) for n in range(20)]
    long = [{"prompt": f"{text}?", "completion": "yes"} for text in texts]
    write_rows(here / "rows.jsonl", long)
    write_rows(here / "held.jsonl", [{**long[5], "prompt": long[5]["prompt"] + "!"}, {"prompt": "New?", "completion": "yes"}])
    found = findings("data.eval=held.jsonl")["held out"]
    assert found.status == "note"
    assert "of 2 validation examples, 1 nearly repeat a training example (" in found.message
    assert "held.jsonl:1 ≈ " in found.message


def test_a_template_that_writes_two_beginnings_is_refused(here, trimtab):
    shutil.rmtree(here / "tiny")
    make_model(here / "tiny", 0, template="{{ bos_token }}" + CHATML)
    done = trimtab("check", "r.yaml")
    assert done.code == 3
    assert "begin with two beginning-of-text tokens" in done.err


def test_what_generation_would_not_see_is_refused(here, monkeypatch):
    """The negative control: tokens that are not the text's, or not the prompt's."""
    real = checks.tokenize_prompt
    for name, broken in (
        ("tokenize_prompt", lambda messages, base, *more: [*real(messages, base, *more)[:-1], 5]),
        ("message_texts", lambda message: ["something else"]),
    ):
        monkeypatch.setattr(checks, name, broken)
        found = findings()["rendering"]
        assert found.status == "problem"
        assert len(found.facts["different"]) == 20
        with pytest.raises(DataError, match="the targets of 30 of 30 examples differ from what generation writes"):
            refuse_problems([found])


def test_an_answer_without_its_stop_token_is_noticed(here):
    given = open_recipe(Recipe.read(Path("r.yaml"), []))
    cut = [replace(row, ids=row.ids[:-1], target_indices=row.target_indices[:-1]) for row in given.data.train]
    given.data.train = cut[:1] + given.data.train[1:]
    assert {one.name: one.status for one in check_data(given.data, [], given.base)}["stop tokens"] == "note"
    given.data.train = cut
    assert {one.name: one.status for one in check_data(given.data, [], given.base)}["stop tokens"] == "problem"


def test_the_same_answer_everywhere_and_too_little_data_are_noted(here):
    found = findings("method.rank=32", "data.eval=28")
    assert found["answers"].message.startswith("all 2 examples have the same answer")
    assert found["answers"].status == "note"
    assert found["capacity"].status == "note"


def test_lengths_that_alone_tell_answers_apart_are_noted(here):
    write_rows(
        here / "rows.jsonl",
        [{"prompt": f"Is {n} a number?", "chosen": "yes " * 9 + str(n), "rejected": f"no {n}"} for n in range(20)],
    )
    found = findings("objective=dpo", "data.eval=4")["lengths"]
    assert found.status == "note"
    assert found.message.endswith("and the model will learn to answer longer")


def test_a_disk_without_room_is_refused_before_the_run(here, trimtab, monkeypatch):
    usage = shutil.disk_usage(here)
    monkeypatch.setattr(before.shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    for command in ("check", "train"):
        done = trimtab(command, "r.yaml", "output=new")
        assert done.code == 6
        assert "free some, or choose another folder" in done.err
    assert not (here / "new").exists()


def test_a_run_remembers_its_proof_and_says_what_is_odd(here, trimtab):
    done = trimtab("train", "r.yaml", "output=new", "train.epochs=1")
    assert done.code == 0
    kept = {one["name"]: one for one in json.loads((here / "new" / "data.json").read_text())["proof"]}
    assert kept["answers"]["status"] == "note"
    assert kept["stop tokens"]["facts"]["share"] == 1.0
    assert "all 26 examples have the same answer" in done.out


def test_conversations_that_are_laid_out_turn_by_turn_are_compared_too(here):
    """As Qwen3's template does, which drops earlier thinking."""
    shutil.rmtree(here / "tiny")
    template = CHATML.replace("{{ m['content'] }}", "{{ m['content'] if loop.last else m['content'].split('</think>')[-1] }}")
    make_model(here / "tiny", 0, template=template)
    talk = [
        {"role": "user", "content": "a?"}, {"role": "assistant", "content": "<think>hm</think>b"},
        {"role": "user", "content": "c?"}, {"role": "assistant", "content": "<think>ha</think>d"},
    ]  # fmt: skip
    write_rows(here / "rows.jsonl", [{"messages": talk[:2]}, *({"messages": talk} for _ in range(6))])
    found = findings("data.eval=0")["rendering"]
    assert (found.status, found.facts["turn_by_turn"]) == ("good", 6)


transformers.utils.logging.disable_progress_bar()


BEGINS = "{% if not quick %}<think>\n{% endif %}{% endif %}"
"""What a prompt ends with that has the model begin by reasoning."""


@pytest.mark.parametrize(
    ("answer", "words", "said"),
    [
        ("yes", [], "note: the prompt opens the reasoning, and 30 of 30 answers have none: the model learns to end it at once. If it is to "
         "reason, give messages their reasoning_content; if not, set model.template.quick=true"),
        ("<think>\nHm.\n</think>\n\nyes", [], "good: the prompt opens the reasoning, and all of 30 answers continue with some"),
        ("yes", ["model.template.quick=true"], None),
    ],
)  # fmt: skip
def test_answers_without_reasoning_are_noted_where_the_prompt_begins_it(answer, words, said, here):
    make_model(here / "thinking", 0, CHATML.removesuffix("{% endif %}") + BEGINS)
    write_rows(here / "rows.jsonl", [{"prompt": f"Is {n} a number?", "completion": answer} for n in range(30)])
    found = findings("model=thinking", *words).get("reasoning")
    assert (f"{found.status}: {found.message}" if found else None) == said
