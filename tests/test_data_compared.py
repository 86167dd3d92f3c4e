"""Rows in which answers are compared or judged: every shape that is in use, and no row that could teach nothing or the wrong thing."""

import json

import pytest
from templates import FAMILIES

from trimtab.core.errors import DataError
from trimtab.data import DataConfig, Judged, Preference, load_data, load_examples, row_groups

BASE = FAMILIES["chatml"].make
USER, GOOD, BAD = {"role": "user", "content": "2+2?"}, "It is 4.", "It is 5."
TURN = {"from": "human", "value": "2+2?"}


def said(text):
    return {"role": "assistant", "content": text}


def spoken(text):
    return {"from": "gpt", "value": text}


PAIRS = {
    "texts after a prompt": {"prompt": "2+2?", "chosen": GOOD, "rejected": BAD},
    "messages after a prompt": {"prompt": [USER], "chosen": [said(GOOD)], "rejected": [said(BAD)]},
    "a message after a text": {"prompt": "2+2?", "chosen": said(GOOD), "rejected": said(BAD)},
    "texts after messages in a prompt": {"prompt": [USER], "chosen": GOOD, "rejected": BAD},
    "messages": {"messages": [USER], "chosen": said(GOOD), "rejected": said(BAD)},
    "messages and texts": {"messages": [USER], "chosen": GOOD, "rejected": BAD},
    "messages and turns": {"messages": [USER], "chosen": spoken(GOOD), "rejected": spoken(BAD)},
    "ShareGPT": {"conversations": [TURN], "chosen": spoken(GOOD), "rejected": spoken(BAD)},
    "ShareGPT and messages": {"conversations": [TURN], "chosen": said(GOOD), "rejected": said(BAD)},
    "ShareGPT and texts": {"conversations": [TURN], "chosen": GOOD, "rejected": BAD},
    "Alpaca": {"instruction": "2+2?", "input": "", "chosen": GOOD, "rejected": BAD},
    "whole conversations": {"chosen": [USER, said(GOOD)], "rejected": [USER, said(BAD)]},
    "whole ShareGPT conversations": {"chosen": [TURN, spoken(GOOD)], "rejected": [TURN, spoken(BAD)]},
    "whole conversations beside their prompt": {"prompt": "2+2?", "chosen": [USER, said(GOOD)], "rejected": [USER, said(BAD)]},
}
JUDGED = {
    "messages": {"messages": [USER, said(GOOD)]},
    "prompt": {"prompt": "2+2?", "completion": GOOD},
    "messages in a prompt": {"prompt": [USER], "completion": [said(GOOD)]},
    "ShareGPT": {"conversations": [TURN, spoken(GOOD)]},
    "Alpaca": {"instruction": "2+2?", "output": GOOD},
}


def written(tmp_path, *rows):
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return str(tmp_path / "rows.json")


def read(tmp_path, row, kind="pairs"):
    examples, report = load_examples(written(tmp_path, row), kind=kind)
    return examples[0] if examples else report.rejected[0].reason


@pytest.mark.parametrize("shape", PAIRS)
def test_pairs_come_in_every_shape(tmp_path, shape):
    pair = read(tmp_path, PAIRS[shape])
    assert isinstance(pair, Preference)
    for side, answer in ((pair.chosen, GOOD), (pair.rejected, BAD)):
        assert [(m["role"], m["content"]) for m in side.messages] == [("user", "2+2?"), ("assistant", answer)]
    both = read(tmp_path, PAIRS[shape], "judged")
    assert both.as_judged
    assert both.chosen == pair.chosen


@pytest.mark.parametrize("shape", JUDGED)
@pytest.mark.parametrize("label", ["label", "kto_tag"])
@pytest.mark.parametrize(
    ("value", "good"),
    [
        (True, True),
        (False, False),
        (1, True),
        (0, False),
        ("true", True),
        (" False ", False),
        ("1", True),
        ("0 ", False),
    ],
)
def test_judged_answers_come_in_every_shape(tmp_path, shape, label, value, good):
    judged = read(tmp_path, {**JUDGED[shape], label: value}, "judged")
    assert isinstance(judged, Judged)
    assert judged.good is good
    assert judged.conversation.messages[-1]["content"] == GOOD


def test_earlier_answers_are_read_and_not_learned(tmp_path):
    turns = [USER, said("4"), {"role": "user", "content": "Sure?"}]
    pair = read(tmp_path, {"messages": turns, "chosen": said("Yes."), "rejected": said("No.")})
    assert pair.chosen.weights == {0: 0, 1: 0, 2: 0, 3: 1}
    data = load_data(
        DataConfig(train=written(tmp_path, {"messages": turns, "chosen": "Yes.", "rejected": "No."}), eval=0),
        BASE(),
        None,
        0,
        "pairs",
    )
    for sequence, answer in zip(data.train, ("Yes.", "No."), strict=True):
        assert BASE().decode([sequence.ids[n] for n in sequence.target_indices]) == answer
        assert sequence.ids[sequence.target_indices[-1]] == BASE().template.ending.token


REFUSED = {
    "no rejected": ({"prompt": "a", "chosen": "b"}, "column 'rejected' is missing beside prompt, chosen"),
    "null": ({"prompt": "a", "chosen": "b", "rejected": None}, "column 'rejected' is null"),
    "same": ({"prompt": "a", "chosen": "b", "rejected": "b"}, "the same answer"),
    "empty": ({"prompt": "a", "chosen": "", "rejected": "b"}, "with chosen: completion is empty"),
    "empty turn": ({"messages": [USER], "chosen": said(""), "rejected": said("b")}, "content is empty"),
    "two answers": (
        {"messages": [USER], "chosen": [said("a"), said("b")], "rejected": said("b")},
        "chosen is a list, not one answer",
    ),
    "a question": (
        {"messages": [USER], "chosen": USER, "rejected": said("b")},
        "chosen does not end with a message of the assistant's",
    ),
    "other prompts": ({"chosen": [USER, said("a")], "rejected": [{**USER, "content": "3+3?"}, said("b")]}, "different prompts"),
    "not its prompt": ({"prompt": "x", "chosen": [USER, said("a")], "rejected": [USER, said("b")]}, "the prompt is in neither"),
    "texts alone": ({"chosen": "a", "rejected": "b"}, "not a list of messages, and no other column holds a prompt"),
    "no turns": ({"messages": "a", "chosen": "a", "rejected": "b"}, "messages is a string"),
}


@pytest.mark.parametrize("row", REFUSED)
def test_what_compares_nothing_is_refused(tmp_path, row):
    values, reason = REFUSED[row]
    assert reason in read(tmp_path, values)


@pytest.mark.parametrize("value", ["yes", 2, "", [True], 0.5])
def test_a_label_that_says_neither_is_refused(tmp_path, value):
    assert "not true (a good answer) or false" in read(tmp_path, {"prompt": "a", "completion": "b", "label": value}, "judged")


def test_each_kind_says_what_it_wants_of_the_others_rows(tmp_path):
    for row in (PAIRS["texts after a prompt"], PAIRS["ShareGPT"], PAIRS["whole conversations"]):
        assert "compares two answers" in read(tmp_path, row, "answers")
    assert "column 'chosen' is missing" in read(tmp_path, {"prompt": "a", "completion": "b"}, "pairs")
    assert "column 'label' is missing" in read(tmp_path, {"prompt": "a", "completion": "b"}, "judged")
    assert "has label, which kto trains on" in read(tmp_path, {"messages": [USER, said("a")], "label": False}, "answers")


def test_sides_stay_together_and_are_held_out_together(tmp_path):
    source = written(tmp_path, *({"prompt": f"{n}?", "chosen": f"{n}.", "rejected": "no"} for n in range(20)))
    data = load_data(DataConfig(train=source, eval=0.25), BASE(), None, 0, "pairs")
    assert [one.side for one in data.train] == ["chosen", "rejected"] * 15
    assert row_groups(data.train) == [[2 * n, 2 * n + 1] for n in range(15)]
    assert not {one.where for one in data.train} & {one.where for one in data.eval}
    apart = load_data(DataConfig(train=source, eval=0), BASE(), None, 0, "judged")
    assert [one.side for one in apart.train] == ["good", "bad"] * 20
    assert row_groups(apart.train) == [[n] for n in range(40)]
    assert apart.reports[0].used == 20


def test_sides_that_are_the_same_once_they_are_cut_are_refused(tmp_path):
    source = written(tmp_path, {"prompt": "a", "chosen": "the answer is one", "rejected": "the answer is two"})
    (chosen, _) = load_data(DataConfig(train=source, eval=0), BASE(), None, 0, "pairs").train
    limit = chosen.target_indices[0] + 2
    with pytest.raises(DataError, match="the same tokens up to where they end"):
        load_data(DataConfig(train=source, eval=0, max_length=limit, overlong="truncate"), BASE(), None, 0, "pairs")
    with pytest.raises(DataError, match="chosen: has"):
        load_data(DataConfig(train=source, eval=0, max_length=limit), BASE(), None, 0, "pairs")


def test_a_text_without_a_template_is_prompt_and_completion(tmp_path):
    base = FAMILIES["chatml"].make()
    plain = type(base)(
        base.model, type(base.tokenizer)(tokenizer_object=base.tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    )
    data = load_data(DataConfig(train=written(tmp_path, PAIRS["texts after a prompt"]), eval=0), plain, None, 0, "pairs")
    assert [plain.decode(one.ids) for one in data.train] == [f"2+2?{GOOD}", f"2+2?{BAD}"]


def test_what_was_said_before_is_not_what_is_compared(tmp_path):
    """Only the last messages are answers: that they are an earlier one's words makes them no less different."""
    before = [USER, said(GOOD), USER]
    assert isinstance(read(tmp_path, {"chosen": [*before, said(BAD)], "rejected": [*before, said(GOOD)]}), Preference)
    same = read(tmp_path, {"chosen": [*before, said(BAD)], "rejected": [*before, said(BAD)]})
    assert same == "chosen and rejected are the same answer, so neither is the better one"


def test_a_list_of_one_answer_is_that_answer(tmp_path):
    pair = read(tmp_path, {"messages": [USER], "chosen": [said(GOOD)], "rejected": [BAD]})
    assert [side.messages[-1]["content"] for side in (pair.chosen, pair.rejected)] == [GOOD, BAD]


@pytest.mark.parametrize(("row", "reason"), [
    ({"instruction": "2+2?", "chosen": [GOOD], "rejected": BAD}, "chosen is a list, not a text"),
    ({"chosen": [USER, said(GOOD), USER], "rejected": [USER, said(BAD)]}, "chosen does not end with a message of the assistant's"),
    ({"chosen": [USER, said(GOOD)], "rejected": [USER, said(BAD), USER]}, "rejected does not end with a message of the assistant's"),
    ({"prompt": "", "chosen": GOOD, "rejected": BAD}, "with chosen: prompt is empty"),
    (
        {"prompt": "2+2?", "chosen": [USER, said(GOOD)], "rejected": [{"role": "user", "content": "3+3?"}, said(BAD)]},
        "chosen and rejected answer different prompts, so they can't be compared",
    ),
])  # fmt: skip
def test_what_is_no_answer_to_a_prompt_is_refused(tmp_path, row, reason):
    assert read(tmp_path, row) == reason


def test_a_prompt_beside_whole_conversations_may_be_any_of_their_messages(tmp_path):
    before = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}, said("2"), USER]
    for prompt in ("Be brief.", "1+1?", "2+2?"):
        assert isinstance(
            read(tmp_path, {"prompt": prompt, "chosen": [*before, said(GOOD)], "rejected": [*before, said(BAD)]}), Preference
        )
    refused = read(tmp_path, {"prompt": GOOD, "chosen": [*before, said(GOOD)], "rejected": [*before, said(BAD)]})
    assert refused == "chosen and rejected are whole conversations, and the prompt is in neither of them"
