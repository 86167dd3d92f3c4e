"""The demo's rows are right, and those it is tested on are new: no shared names, cities, items or messages."""

import difflib
import json
import re
import runpy
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[1] / "demo"
MAKER = runpy.run_path(str(DEMO / "make_data.py"))
FIELDS = ("quantity", "item", "customer", "city", "day")
DIGITS = {"a dozen": "12", **{word: str(number) for number, word in MAKER["NUMBERS"].items()}}
QUANTITY = re.compile(rf"\b(?:\d+|{'|'.join(DIGITS)})\b", re.IGNORECASE)


def read(split):
    """(message, its answer's fields) of each row."""
    texts = (DEMO / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    for messages in (json.loads(text)["messages"] for text in texts):
        assert [message["role"] for message in messages] == ["system", "user", "assistant"]
        assert messages[0]["content"] == MAKER["SYSTEM"]
        yield messages[1]["content"], dict(zip(FIELDS, messages[2]["content"].split(" | "), strict=True))


ROWS = {split: list(read(split)) for split in ("train", "test")}
ALL = ROWS["train"] + ROWS["test"]


def words(split, field):
    return {word for _, fields in ROWS[split] for word in fields[field].split()} - {"-"}


def phrasing(message, fields):
    """The message without what the answer takes from it."""
    for field in FIELDS[1:]:
        if fields[field] != "-":
            message = re.sub(rf"\b{fields[field]}\b", f"<{field}>", message)
    return QUANTITY.sub("<quantity>", message)


@pytest.mark.parametrize(("number", "split"), [(0, "train"), (1, "test")])
def test_the_files_are_what_the_generator_writes(number, split):
    assert (DEMO / f"{split}.jsonl").read_bytes().decode() == MAKER["jsonl"](MAKER["make"]()[number])


def test_there_are_enough_rows_and_no_message_twice():
    assert len(ROWS["train"]) >= 400
    assert len(ROWS["test"]) >= 100
    assert len({message for message, _ in ALL}) == len(ALL)


def test_each_answer_follows_from_its_message():
    for message, fields in ALL:
        (quantity,) = QUANTITY.findall(message)
        assert fields["quantity"] == DIGITS.get(quantity.lower(), quantity), message
        for field in FIELDS[1:]:
            assert fields[field] == "-" or len(re.findall(rf"\b{fields[field]}\b", message)) == 1, (field, message)
        assert fields["item"] != "-"


@pytest.mark.parametrize("field", FIELDS[2:])
def test_a_field_left_empty_is_not_in_the_message(field):
    known = words("train", field) | words("test", field)
    empty = [message for message, fields in ALL if fields[field] == "-"]
    assert empty
    for message in empty:
        assert not known & set(re.findall(r"\w+", message)), message


@pytest.mark.parametrize("field", ["item", "customer", "city"])
def test_the_test_shares_no_word_of_its_names_cities_and_items_with_the_training(field):
    assert not words("train", field) & words("test", field)


def test_a_third_of_the_test_is_phrased_in_ways_that_the_training_never_is():
    trained = {phrasing(*row) for row in ROWS["train"]}
    new = [row for row in ROWS["test"] if phrasing(*row) not in trained]
    assert len(new) >= len(ROWS["test"]) / 3


def test_the_new_phrasings_are_no_near_copies():
    seen = [re.sub(r"{\w+}", "", template) for template in MAKER["SEEN"]]
    for new in MAKER["NEW"]:
        assert not difflib.get_close_matches(re.sub(r"{\w+}", "", new), seen, cutoff=0.75), new
