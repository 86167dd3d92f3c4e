"""Plain texts: files and folders of documents, every token of them a target once, however long they are."""

import gzip
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from templates import CORPUS, FAMILIES
from worlds import write_rows

from trimtab.core.errors import DataError
from trimtab.data import (
    DataConfig,
    LengthLimit,
    SourceReport,
    Text,
    check_data,
    first_examples,
    load_data,
    plain_texts,
    token_rows,
    tokenize_examples,
)
from trimtab.data import lengths as module_of_lengths
from trimtab.data.plain_texts import encode_long, tokenize_texts

NAMES = ("chatml", "llama3", "mistral", "phi3")
"""Tokenizers of bytes with several ways to split words, and of pieces; with a BOS and without."""


def loaded(train, base=None, **settings):
    return load_data(DataConfig(**{"eval": 0, "train": str(train), **settings}), base or FAMILIES["chatml"].make(), None, 0)


def message_of(train, **settings):
    with pytest.raises(DataError) as caught:
        loaded(train, **settings)
    return str(caught.value)


def texts_of(rows, base):
    return [base.tokenizer.decode(row.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) for row in rows]


# Files


def test_a_file_is_a_document_and_a_folder_is_all_of_them(tmp_path):
    base = FAMILIES["chatml"].make()
    (tmp_path / "part").mkdir()
    (tmp_path / "b.md").write_text("# The answer\n\nhello\n")
    (tmp_path / "part" / "training.txt").write_text("\n\nhello\nworld")
    (tmp_path / "test.txt.gz").write_bytes(gzip.compress("中文".encode()))
    (tmp_path / "windows.txt").write_text("two\r\nlines\r\n", encoding="utf-16", newline="")
    rows = loaded(tmp_path, base).train
    assert texts_of(rows, base) == ["# The answer\n\nhello", "hello\nworld", "中文", "two\nlines"]
    assert [row.where.removeprefix(f"{tmp_path}/") for row in rows] == [
        "b.md:1",
        "part/training.txt:3",
        "test.txt.gz:1",
        "windows.txt:1",
    ]
    for row in rows:
        assert row.ids[-1] == base.end_of_text
        assert row.target_indices == list(range(1, len(row.ids)))
    assert len(loaded(f"{tmp_path}/**/*.txt", base).train) == 2


def test_a_line_that_separates_documents_does_so_and_another_does_not(tmp_path):
    base = FAMILIES["phi3"].make()
    path = tmp_path / "stories.txt"
    path.write_text(
        "<|endoftext|>\nhello\n\nworld\n<|endoftext|>\n\n\nthe <|endoftext|> token\n  <|endoftext|>  \n<|endoftext|>\nlast"
    )
    rows = loaded(path, base).train
    assert texts_of(rows, base) == ["hello\n\nworld", "the  token", "last"]
    assert [row.where.rpartition(":")[2] for row in rows] == ["2", "8", "11"]
    assert "which the model reads as their end" in next(
        finding.message for finding in checked(path, base) if finding.name == "special tokens"
    )


def checked(path, base):
    config = DataConfig(train=str(path), eval=0)
    return check_data(load_data(config, base, None, 0), first_examples(config, 9, 0), base)


def test_what_is_no_plain_text_is_refused(tmp_path):
    write_rows(tmp_path / "rows.txt", [{"text": "a"}, {"text": "b"}])
    assert message_of(tmp_path / "rows.txt").endswith(
        "holds JSON objects, a line each, and not plain text: name it rows.jsonl."
    )
    (tmp_path / "blank.txt").write_text(" \n\n")
    assert f"{tmp_path}/blank.txt:1: text is empty" in message_of(tmp_path / "blank.txt")
    (tmp_path / "blank.txt").write_text("")
    assert f"{tmp_path}/blank.txt:1: text is empty" in message_of(tmp_path / "blank.txt")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    assert "latin.txt:1 is not UTF-8 text" in message_of(tmp_path / "latin.txt")


def test_what_describes_tables_is_no_document_and_a_mixture_of_both_is_refused(tmp_path):
    write_rows(tmp_path / "rows.jsonl", [{"text": "a"}] * 3)
    for name in ("README.md", "LICENSE.txt", "readme_en.md"):
        (tmp_path / name).write_text("about")
    assert len(loaded(tmp_path).train) == 3
    (tmp_path / "chapter.md").write_text("Once")
    assert message_of(tmp_path) == (
        f"data: {tmp_path} holds several kinds of files (.jsonl, plain text). Choose one, for example:\n"
        f"  data.train='{tmp_path}/*.jsonl'\n  data.train='{tmp_path}/**/*.md'"
    )
    assert len(loaded(f"{tmp_path}/**/*.md").train) == 3
    for split in ("train", "test"):
        (tmp_path / "texts" / split).mkdir(parents=True)
        (tmp_path / "texts" / split / "a.txt").write_text("a")
    assert "holds several splits (test, train)" in message_of(tmp_path / "texts")


# Blocks


def long_text(draw, words):
    return " ".join(draw.choice(" ".join(CORPUS).split(" ")) for _ in range(words))


def check_blocks(blocks, whole, most):
    """Against an independent cut: the text's tokens, each but the first the target of one block, after the token before it."""
    predicted = [(row.ids[t - 1], row.ids[t]) for row in blocks for t in row.target_indices]
    assert predicted == [(whole.ids[t - 1], whole.ids[t]) for t in whole.target_indices]
    joined = blocks[0].ids + [token for row in blocks[1:] for token in row.ids[1:]]
    assert joined == whole.ids
    assert all(len(row.ids) == most for row in blocks[:-1])
    assert 2 <= len(blocks[-1].ids) <= most
    assert len(blocks) == max(1, -(-(len(whole.ids) - 1) // (most - 1)))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(NAMES), st.integers(2, 70), st.integers(1, 120), st.integers(0, 99))
def test_every_token_of_a_long_text_is_a_target_once(name, most, words, seed):
    base, text = FAMILIES[name].make(), long_text(random.Random(seed), words)
    ((whole,),) = tokenize_texts([Text(text, "a:1")], base, LengthLimit())
    (blocks,) = tokenize_texts([Text(text, "a:1")], base, LengthLimit(most, "split"))
    direct = base.tokenizer(text)["input_ids"]
    assert whole.ids[: len(direct)] == direct
    check_blocks(blocks, whole, most)


def test_another_cut_would_be_noticed(monkeypatch):
    base = FAMILIES["chatml"].make()
    text = long_text(random.Random(0), 90)
    ((whole,),) = tokenize_texts([Text(text, "a:1")], base, LengthLimit())
    for most, overlap in ((20, 0), (20, 2)):
        blocks = []
        for start in range(0, len(whole.ids) - 1, most - overlap):
            (row,) = module_of_lengths.split_text(whole.ids[start : start + most], 1, most, "a:1")
            blocks.append(row)
        with pytest.raises(AssertionError):
            check_blocks(blocks, whole, most)


def test_split_texts_are_counted_and_conversations_refused_with_what_to_do(tmp_path):
    (tmp_path / "long.md").write_text("hello the answer " * 40)
    (tmp_path / "short.md").write_text("hello")
    data = loaded(tmp_path, overlong="split", max_length=32)
    (report,) = data.reports
    assert (report.used, report.split, report.blocks) == (2, 1, len(data.train) - 1)
    assert str(report).endswith(f": 2 examples: 2 used, 0 rejected; 1 long texts split into {report.blocks} blocks")
    held = loaded(tmp_path, overlong="split", max_length=32, eval=1)
    assert {row.where for row in held.train}.isdisjoint(row.where for row in held.eval)  # a document is held out as a whole
    assert "(A text is one example, however long.)" in message_of(
        tmp_path / "long.md", overlong="split", max_length=32, eval=0.1
    )
    write_rows(tmp_path / "talk.jsonl", [{"prompt": "a", "completion": "b " * 60}])
    assert "more than max_length 32; only plain texts can be split, so truncate or drop it" in message_of(
        tmp_path / "talk.jsonl", overlong="split", max_length=32
    )
    assert "41 tokens" not in message_of(tmp_path, max_length=32)


def test_blocks_need_no_stop_token_but_a_truncated_text_is_noted(tmp_path):
    base = FAMILIES["phi3"].make()
    (tmp_path / "long.md").write_text("hello the answer " * 40)
    (tmp_path / "short.md").write_text("hello")
    by_name = {}
    for overlong in ("split", "truncate"):
        config = DataConfig(train=str(tmp_path), eval=0, overlong=overlong, max_length=32)
        by_name[overlong] = {finding.name: finding for finding in check_data(load_data(config, base, None, 0), [], base)}
    assert by_name["split"]["stop tokens"].status == "good"
    assert by_name["truncate"]["stop tokens"].message.startswith("1 of 2 examples do not end with a stop token")


def test_what_is_too_long_is_dropped_and_counted_and_not_everything_may_be(tmp_path):
    rows = [{"prompt": "a", "completion": "b " * length} for length in (1, 90, 2, 80)]
    write_rows(tmp_path / "rows.jsonl", rows)
    data = loaded(tmp_path / "rows.jsonl", overlong="drop", max_length=40)
    assert data.reports[0].dropped == [f"{tmp_path}/rows.jsonl:{n}" for n in (2, 4)]
    assert str(data.reports[0]).endswith(": 4 examples: 2 used, 0 rejected, 2 too long and dropped")
    assert [row.where.rpartition(":")[2] for row in data.train] == ["1", "3"]
    write_rows(tmp_path / "rows.jsonl", rows[1::2])
    message = message_of(tmp_path / "rows.jsonl", overlong="drop", max_length=40)
    assert "all are longer than max_length 40: raise data.max_length, or truncate them" in message
    pairs = [{"prompt": "a", "chosen": "b", "rejected": "c " * length} for length in (1, 90)]
    write_rows(tmp_path / "pairs.jsonl", pairs)
    config = DataConfig(train=str(tmp_path / "pairs.jsonl"), eval=0, overlong="drop", max_length=40)
    data = load_data(config, FAMILIES["chatml"].make(), None, 0, "pairs")
    assert (len(data.train), data.reports[0].dropped) == (2, [f"{tmp_path}/pairs.jsonl:2"])


# Windows


class Windowed:
    """A base that tokenizes no more characters at a time."""

    def __init__(self, base, most):
        self.base, self.most = base, most

    def encode(self, texts, *, special=False):
        assert max(map(len, texts)) <= self.most
        return self.base.encode(texts, special=special)


@pytest.mark.parametrize("name", NAMES)
def test_a_text_window_by_window_has_the_tokens_that_it_has_as_a_whole(name, monkeypatch):
    base = FAMILIES[name].make()
    for window, overlap, same in ((400, 200, 4), (900, 400, 8)):
        monkeypatch.setattr(plain_texts, "WINDOW", window)
        monkeypatch.setattr(plain_texts, "OVERLAP", overlap)
        monkeypatch.setattr(plain_texts, "SAME", same)
        for seed in range(4):
            text = long_text(random.Random(seed), 300) + " 😀 你好 " + long_text(random.Random(-seed), 100)
            tokens = encode_long(text, Windowed(base, window))
            (whole,) = base.encode([text], special=True)
            assert (tokens.ids, tokens.before) == (list(whole.ids), whole.before)


def test_a_text_whose_windows_agree_nowhere_is_tokenized_as_a_whole(monkeypatch):
    base = FAMILIES["mistral"].make()
    monkeypatch.setattr(plain_texts, "WINDOW", 50)
    monkeypatch.setattr(plain_texts, "OVERLAP", 20)
    text = "answerhello" * 20
    (whole,) = base.encode([text], special=True)
    assert encode_long(text, base).ids == list(whole.ids)


def test_windows_that_are_joined_without_looking_would_be_noticed(monkeypatch):
    """The control of the two above."""
    base = FAMILIES["chatml"].make()
    text = long_text(random.Random(1), 300)
    (whole,) = base.encode([text], special=True)
    pieces = [token for start in range(0, len(text), 120) for token in base.encode([text[start : start + 120]])[0].ids]
    assert pieces != list(whole.ids)


def test_long_texts_are_tokenized_a_few_at_a_time(monkeypatch):
    base, sizes = FAMILIES["chatml"].make(), []
    real = token_rows.tokenize_texts
    monkeypatch.setattr(token_rows, "WINDOW", 500)
    monkeypatch.setattr(token_rows, "tokenize_texts", lambda texts, *more: sizes.append(len(texts)) or real(texts, *more))
    report = SourceReport(("a",))
    rows = tokenize_examples((Text("hello " * 40, f"a:{n}") for n in range(9)), base, report)
    assert (sizes, len(rows), report.used) == ([3, 3, 3], 9, 9)


def test_a_run_on_texts_is_evaluated_on_the_blocks_it_was_trained_on(here, trimtab):
    (here / "texts").mkdir()
    for n in range(8):
        (here / "texts" / f"{n}.md").write_text(f"Is {n} a number? yes. " * 12)
    recipe = ["data.train=texts", "data.eval=2", "data.max_length=40", "data.overlong=split", "train.epochs=1", "output=new"]
    done = trimtab("train", "r.yaml", *recipe)
    assert done.code == 0, done.err
    assert "8 long texts split into" in " ".join(done.out.split())
    lines = [json.loads(line) for line in (here / "new" / "metrics.jsonl").read_text().splitlines()]
    best = json.loads((here / "new" / "run.json").read_text())["best"]
    loss = json.loads(trimtab("eval", "new", "--json").out)["loss"]
    assert loss == pytest.approx(best["eval_loss"], rel=1e-5)
    assert any(line["kind"] == "eval" for line in lines)
