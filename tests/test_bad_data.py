"""Bad data files of more than sixty classes, ten of each: never a traceback, and every row is used or refused with its place."""

import gzip
import json
import random
import re

import pytest
from worlds import make_model

from trimtab.base import Base
from trimtab.core.errors import DataError, TrimtabError
from trimtab.data import LengthLimit, load_examples, tokenize_examples
from trimtab.data.preference_formats import FORMATS

GOOD = {"prompt": "Is it?", "completion": "yes"}
TALK = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
SHARE = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
ODD = [
    None,
    3,
    1.5,
    True,
    [],
    {},
    "",
    " ",
    "\x00",
    "\ud800",
    "a" * 4000,
    [[]],
    {"a": {}},
    -0.0,
    1e400,
    "NaN",
    [None],
    "\u202e",
    "😀" * 50,
]
"""Values that stand where others should."""


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def deep(n):
    return ("[" * n + "]" * n).encode()


def changed(row, key, value):
    return {**row, key: value}


def without(row, key):
    return {k: v for k, v in row.items() if k != key}


def turn(talk, at, key, value):
    made = [dict(one) for one in talk["messages"]]
    made[at][key] = value
    return {"messages": made}


TEXTS = {  # name: (suffix, what is in the file, from a random generator)
    "empty jsonl": (".jsonl", lambda d: b""),
    "empty json": (".json", lambda d: b""),
    "empty csv": (".csv", lambda d: b""),
    "empty tsv": (".tsv", lambda d: b""),
    "empty parquet": (".parquet", lambda d: b""),
    "spaces": (".jsonl", lambda d: b" \n\t\r\n" * d.randint(1, 9)),
    "random bytes": (".jsonl", lambda d: d.randbytes(d.randint(1, 999))),
    "random bytes as json": (".json", lambda d: d.randbytes(d.randint(1, 999))),
    "random bytes as csv": (".csv", lambda d: d.randbytes(d.randint(1, 999))),
    "random bytes as parquet": (".parquet", lambda d: b"PAR1" + d.randbytes(d.randint(1, 999)) + b"PAR1"),
    "zeros": (".jsonl", lambda d: bytes(d.randint(1, 999))),
    "cut json": (".json", lambda d: json.dumps([GOOD] * 5).encode()[: d.randint(1, 150)]),
    "cut jsonl": (".jsonl", lambda d: lines(*[GOOD] * 5)[: d.randint(1, 150)]),
    "two values a line": (".jsonl", lambda d: b'{"text": "a"} {"text": "b"}\n' * d.randint(1, 3)),
    "a trailing comma": (".json", lambda d: b'[{"text": "a"},' + b" " * d.randint(0, 5) + b"]"),
    "single quotes": (".jsonl", lambda d: b"{'text': 'a'}\n" * d.randint(1, 3)),
    "comments": (".json", lambda d: b"// rows\n" * d.randint(1, 3) + b'[{"text": "a"}]'),
    "a bom": (".jsonl", lambda d: b"\xef\xbb\xbf" * d.randint(1, 2) + lines(GOOD)),
    "utf-16": (".jsonl", lambda d: lines(*[GOOD] * d.randint(1, 3)).decode().encode("utf-16")),
    "latin-1": (".jsonl", lambda d: '{"text": "caf\xe9"}\n'.encode("latin-1") * d.randint(1, 3)),
    "half a character": (".jsonl", lambda d: b'{"text": "\xe4\xb8"}\n' * d.randint(1, 3)),
    "a lone surrogate": (".jsonl", lambda d: b'{"text": "\\ud800' + b"x" * d.randint(0, 9) + b'"}\n'),
    "a zero in a string": (".jsonl", lambda d: b'{"text": "a\\u0000b"}\n' * d.randint(1, 3)),
    "raw control characters": (".jsonl", lambda d: b'{"text": "a' + bytes([d.randint(0, 31)]) + b'b"}\n'),
    "deep lists": (".json", lambda d: deep(d.choice([99, 999, 9999, 99999]))),
    "deep objects": (".jsonl", lambda d: b'{"a":' * (n := d.choice([99, 999, 99999])) + b"1" + b"}" * n),
    "large numbers": (".jsonl", lambda d: b'{"text": ' + b"9" * d.choice([20, 400, 5000]) + b"}\n"),
    "not a number": (".jsonl", lambda d: b'{"text": ' + d.choice([b"NaN", b"Infinity", b"-Infinity"]) + b"}\n"),
    "the same key twice": (".jsonl", lambda d: b'{"text": "a", "text": "b"}\n' * d.randint(1, 3)),
    "a number alone": (".json", lambda d: str(d.random()).encode()),
    "a string alone": (".json", lambda d: b'"text"'),
    "null alone": (".json", lambda d: b"null"),
    "a list of odd values": (".json", lambda d: json.dumps([d.choice(ODD[:13]) for _ in range(3)]).encode()),
    "an object of lists": (".json", lambda d: json.dumps({"text": ["a"] * d.randint(1, 3)}).encode()),
    "lines of odd values": (".jsonl", lambda d: lines(*(d.choice(ODD[:8]) for _ in range(4)))),
    "no known column": (".jsonl", lambda d: lines({f"c{d.random()}": "x"})),
    "columns of two shapes": (".jsonl", lambda d: lines({**GOOD, **TALK})),
    "an odd prompt": (".jsonl", lambda d: lines(GOOD, changed(GOOD, "prompt", d.choice(ODD)))),
    "an odd completion": (".jsonl", lambda d: lines(GOOD, changed(GOOD, "completion", d.choice(ODD)))),
    "no completion": (".jsonl", lambda d: lines(GOOD, without(GOOD, "completion"))),
    "an odd text": (".jsonl", lambda d: lines({"text": "a"}, {"text": d.choice(ODD)})),
    "odd messages": (".jsonl", lambda d: lines(TALK, {"messages": d.choice(ODD)})),
    "an odd message": (".jsonl", lambda d: lines(TALK, {"messages": [*TALK["messages"], d.choice(ODD)]})),
    "an odd role": (".jsonl", lambda d: lines(TALK, turn(TALK, d.randint(0, 1), "role", d.choice(ODD)))),
    "an odd content": (".jsonl", lambda d: lines(TALK, turn(TALK, d.randint(0, 1), "content", d.choice(ODD)))),
    "an odd weight": (".jsonl", lambda d: lines(TALK, turn(TALK, 1, "weight", d.choice(ODD)))),
    "an odd tool call": (".jsonl", lambda d: lines(TALK, turn(TALK, 1, "tool_calls", d.choice(ODD)))),
    "odd tools": (".jsonl", lambda d: lines(TALK, {**TALK, "tools": d.choice(ODD)})),
    "only the user speaks": (".jsonl", lambda d: lines({"messages": TALK["messages"][:1] * d.randint(1, 3)})),
    "the assistant begins": (".jsonl", lambda d: lines({"messages": TALK["messages"][::-1] * d.randint(1, 3)})),
    "nobody speaks": (".jsonl", lambda d: lines(*[{"messages": []}] * d.randint(1, 3))),
    "odd turns": (".jsonl", lambda d: lines(SHARE, {"conversations": d.choice(ODD)})),
    "an odd turn": (".jsonl", lambda d: lines(SHARE, {"conversations": [*SHARE["conversations"], d.choice(ODD)]})),
    "an odd from": (".jsonl", lambda d: lines({"conversations": [{"from": d.choice(ODD), "value": "a"}]})),
    "an odd instruction": (".jsonl", lambda d: lines({"instruction": d.choice(ODD), "output": "b"})),
    "an odd output": (".jsonl", lambda d: lines({"instruction": "a", "input": "", "output": d.choice(ODD)})),
    "an odd history": (".jsonl", lambda d: lines({"instruction": "a", "output": "b", "history": d.choice(ODD)})),
    "control tokens in a message": (".jsonl", lambda d: lines(turn(TALK, d.randint(0, 1), "content", "x<|im_end|>y"))),
    "a chosen like the rejected": (".jsonl", lambda d: lines(PAIR, {**PAIR, "rejected": "b"})),
    "an odd chosen": (".jsonl", lambda d: lines(PAIR, changed(PAIR, "chosen", d.choice(ODD)))),
    "an odd rejected": (".jsonl", lambda d: lines(PAIR, changed(PAIR, "rejected", d.choice(ODD)))),
    "an odd label": (".jsonl", lambda d: lines({**GOOD, "label": True}, {**GOOD, "label": d.choice(ODD)})),
    "ragged csv": (".csv", lambda d: b"prompt,completion\na,b\nc\nd,e,f" + b",g" * d.randint(0, 3) + b"\n"),
    "an open quote in csv": (".csv", lambda d: b'prompt,completion\n"a,b\n' * d.randint(1, 3)),
    "csv without rows": (".csv", lambda d: b"prompt,completion\n"),
    "csv with a column twice": (".csv", lambda d: b"prompt,prompt,completion\na,b,c\n"),
    "csv of another encoding": (".csv", lambda d: "prompt,completion\ncaf\xe9,b\n".encode("latin-1")),
    "tsv with commas": (".tsv", lambda d: b"prompt,completion\na,b\n"),
    "compressed": (".jsonl", lambda d: gzip.compress(lines(*[GOOD] * d.randint(1, 3)))),
    "an unknown suffix": (f".{'xyz'}", lambda d: lines(GOOD)),
    "a very long line": (".jsonl", lambda d: lines({"text": "word " * d.choice([1000, 20000])})),
    "a very long name": (".jsonl", lambda d: lines({"n" * 9999: "x"})),
    "mostly good": (".jsonl", lambda d: lines(*[GOOD] * 5, d.choice(ODD[:8]), *[GOOD] * 3)),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad") / "tiny"
    make_model(folder, 0)
    return Base.load(str(folder))


def test_there_are_enough_classes():
    assert len(TEXTS) >= 60


def assert_none(unnamed):
    assert unnamed == [], "which file it is"


@pytest.mark.parametrize("name", TEXTS)
def test_bad_files_are_accounted_for_or_refused(name, base, tmp_path, one_thread):
    suffix, made = TEXTS[name]
    for number in range(10):
        path = tmp_path / f"file-{number}{suffix}"
        path.write_bytes(made(random.Random(f"{name}/{number}")))
        for kind in FORMATS:
            try:
                examples, report = load_examples(str(path), kind=kind)
            except DataError as error:
                unnamed = [] if path.name in str(error) else [str(error)]
                assert_none(unnamed)
                continue
            assert all(where.startswith(str(path)) and reason for where, reason in report.rejected)
            refused = len(report.rejected)
            sequences = tokenize_examples(examples, base, report, LengthLimit(128))
            assert report.total == report.used + len(report.rejected) == len(examples) + refused
            if suffix == ".jsonl":
                assert report.total == rows_in(path.read_bytes())
            known = {where for where, _ in report.rejected}
            assert {row.where for row in sequences} == {e.where for e in examples} - known
            assert all(
                row.target_indices and row.target_indices[0] > 0 and row.target_indices[-1] < len(row.ids) <= 128
                for row in sequences
            )


def rows_in(content):
    """The lines of a file, counted otherwise than it is read."""
    content = content.decode("utf-16").encode() if content.startswith(b"\xff\xfe") else content
    return sum(bool(line.strip(b" \t\r\xef\xbb\xbf")) for line in re.split(rb"\r\n|\n|\r", content))


def test_a_reader_that_loses_rows_is_noticed(base, tmp_path, one_thread, monkeypatch):
    """The negative control."""
    from trimtab.data import examples

    real = examples.read_examples
    monkeypatch.setattr(examples, "read_examples", lambda *given: (e for n, e in enumerate(real(*given)) if n))
    with pytest.raises(AssertionError):
        test_bad_files_are_accounted_for_or_refused("mostly good", base, tmp_path, None)


def test_what_is_not_a_file_is_refused_too(tmp_path):
    for name in ("nothing.jsonl", ".", "no/such/folder", "\x00", "https://example.org/rows.jsonl"):
        with pytest.raises(TrimtabError):
            load_examples(str(tmp_path / name) if "://" not in name else name)
