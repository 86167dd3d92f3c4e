"""Every row of every format, with the line that it stands in; and nothing that is wrong with a file passes unsaid."""

import errno
import json
import os
import re
from pathlib import Path
from unittest.mock import Mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from templates import FAMILIES

from trimtab.core.errors import DataError, StorageError, TrimtabError
from trimtab.data import DataConfig, RejectedExample, Source, load_data, load_examples, read, text_files
from trimtab.data import read as reading
from trimtab.data.arrow_files import without_padding
from trimtab.data.strict_json import parse_json

ROWS = [{"prompt": f"question {n}", "completion": f"answer {n}"} for n in range(3)]


def written(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def read_rows(path, report=None, seed=0, **settings):
    return read.read_rows(Source(path=str(path), **settings), report, seed)


def places(source: str) -> list[tuple[str, object]]:
    """Each row or refusal as what follows the source's name in its place, and its columns or the reason."""
    return [(row[0].removeprefix(source), row[1]) for row in read_rows(source)]


def refusals(source: str) -> list[str]:
    """Refusals as they are shown, without the folder."""
    folder = f"{Path(source).parent}/"
    return [f"{row.where}: {row.reason}".removeprefix(folder) for row in read_rows(source) if isinstance(row, RejectedExample)]


def message_of(source: str, kind: type[Exception] = DataError) -> str:
    with pytest.raises(kind) as caught:
        list(read_rows(source))
    return str(caught.value)


# Each format, and the lines of its rows


def test_json_lines_give_each_row_its_line(tmp_path):
    lines = [json.dumps(ROWS[0]), "", "   \t", json.dumps(ROWS[1]), json.dumps(ROWS[2])]
    source = written(tmp_path, "rows.jsonl", "\n".join(lines))
    assert places(source) == [(":1", ROWS[0]), (":4", ROWS[1]), (":5", ROWS[2])]


@pytest.mark.parametrize("name", ["rows.ndjson", "ROWS.JSONL", "rows.json"])
def test_json_lines_are_read_under_all_their_endings(tmp_path, name):
    source = written(tmp_path, name, "\n".join(map(json.dumps, ROWS)) + "\n")
    assert places(source) == [(":1", ROWS[0]), (":2", ROWS[1]), (":3", ROWS[2])]


def test_windows_line_ends_count_once(tmp_path):
    source = written(tmp_path, "rows.jsonl", "\r\n".join([json.dumps(ROWS[0]), "", json.dumps(ROWS[1])]) + "\r\n")
    assert places(source) == [(":1", ROWS[0]), (":3", ROWS[1])]


def test_unicode_line_separators_within_a_text_do_not_end_a_row(tmp_path):
    row = {"text": "a\u2028b\u2029c\x85d\x0be\x0cf"}
    source = written(tmp_path, "rows.jsonl", json.dumps(row, ensure_ascii=False) + "\n" + json.dumps(ROWS[0]))
    assert places(source) == [(":1", row), (":2", ROWS[0])]


def test_rows_of_an_array_over_several_lines_have_the_line_they_start_in(tmp_path):
    text = '[\n  {\n    "text": "a"\n  },\n\n  {"text":\n "b"}\n , {"text": "c"}\n]\n'
    source = written(tmp_path, "rows.json", text)
    assert places(source) == [(":2", {"text": "a"}), (":6", {"text": "b"}), (":8", {"text": "c"})]
    lines = text.split("\n")
    for place, _ in places(source):
        assert "{" in lines[int(place[1:]) - 1]


def test_rows_that_share_a_line_have_a_place_of_their_own_each(tmp_path):
    text = '[{"text": "a"}, {"text": "b"},\n{"text": "c"}, {"text": "d"}]'
    source = written(tmp_path, "rows.json", text)
    assert places(source) == [(":1", {"text": "a"}), (":1:17", {"text": "b"}), (":2", {"text": "c"}), (":2:16", {"text": "d"})]
    assert text[17 - 1 :].startswith('{"text": "b"}')
    assert text.split("\n")[1][16 - 1 :].startswith('{"text": "d"}')


def test_csv_with_quoted_newlines_and_blank_lines_gives_each_row_the_line_it_starts_in(tmp_path):
    text = 'prompt,completion\n"a\nb","c"\n\n\nd,"e ""f"",\n\ng"\nh,i\n'
    source = written(tmp_path, "rows.csv", text)
    assert places(source) == [
        (":2", {"prompt": "a\nb", "completion": "c"}),
        (":6", {"prompt": "d", "completion": 'e "f",\n\ng'}),
        (":9", {"prompt": "h", "completion": "i"}),
    ]


def test_a_csv_header_may_follow_blank_lines_and_span_lines(tmp_path):
    source = written(tmp_path, "rows.csv", '\n\n"my\nprompt",completion\na,b\n')
    assert places(source) == [(":5", {"my\nprompt": "a", "completion": "b"})]


def test_tsv_is_split_at_tabs_alone(tmp_path):
    source = written(tmp_path, "rows.tsv", "prompt\tcompletion\na, b\tc\r\nd\te;f\r\n")
    assert places(source) == [(":2", {"prompt": "a, b", "completion": "c"}), (":3", {"prompt": "d", "completion": "e;f"})]


def test_a_csv_cell_may_be_longer_than_128_kib(tmp_path):
    source = written(tmp_path, "rows.csv", f"text\n{'x' * 200_000}\ny\n")
    assert places(source) == [(":2", {"text": "x" * 200_000}), (":3", {"text": "y"})]


def test_a_csv_file_may_have_many_columns(tmp_path):
    names = [f"c{n}" for n in range(300)]
    source = written(tmp_path, "rows.csv", f"{','.join(names)}\n{','.join(map(str, range(300)))}\n")
    assert places(source) == [(":2", {name: str(n) for n, name in enumerate(names)})]


def test_a_csv_column_without_a_name_is_kept(tmp_path):
    """Pandas writes its row numbers so."""
    source = written(tmp_path, "rows.csv", ",prompt,completion\n0,a,b\n")
    assert places(source) == [(":2", {"": "0", "prompt": "a", "completion": "b"})]


def test_parquet_rows_are_numbered(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "rows.parquet"
    rows = [{"text": f"row {n}"} for n in range(2500)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=700)
    assert places(str(path)) == [(f":{n}", row) for n, row in enumerate(rows, start=1)]


@pytest.fixture
def quiet_datasets():
    import datasets

    datasets.disable_progress_bars()
    yield datasets
    datasets.enable_progress_bars()


def test_a_folder_that_datasets_saved_is_read(tmp_path, quiet_datasets):
    quiet_datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert places(str(tmp_path / "saved")) == [(":1", ROWS[0]), (":2", ROWS[1]), (":3", ROWS[2])]


def test_of_several_saved_splits_train_is_read_and_any_can_be_named(tmp_path, quiet_datasets):
    train, test = (quiet_datasets.Dataset.from_list([row]) for row in ROWS[:2])
    quiet_datasets.DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "saved")
    assert places(str(tmp_path / "saved")) == [(":1", ROWS[0])]
    assert places(str(tmp_path / "saved" / "test")) == [(":1", ROWS[1])]
    quiet_datasets.DatasetDict({"valid": train, "test": test}).save_to_disk(tmp_path / "other")
    folder = tmp_path / "other"
    assert message_of(str(folder)) == f"data: {folder} has the splits valid, test; give one, for example {folder}/valid."


def test_another_folder_or_a_damaged_one_is_refused(tmp_path, quiet_datasets):
    assert message_of(str(tmp_path)).startswith(f"data: {tmp_path} holds no data file (.json, ")
    saved = tmp_path / "saved"
    quiet_datasets.Dataset.from_list(ROWS).save_to_disk(saved)
    (arrow,) = saved.glob("*.arrow")
    whole, state = arrow.read_bytes(), (saved / "state.json").read_text()
    for file, content in (("state.json", "{}"), ("state.json", "[1]"), ("dataset_info.json", "{"), (arrow.name, "")):
        (saved / "state.json").write_text(state)
        arrow.write_bytes(whole)
        (saved / file).write_text(content)
        assert message_of(str(saved)).startswith(f"data: {saved}")


# The hub


def test_a_hub_name_is_fetched_with_its_split(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, subset, **more):
        assert more.pop("trust_remote_code") is False
        asked.append((name, subset, *more.values()))
        return datasets.Dataset.from_list(ROWS[:1])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(read_rows("org/some-name.v2")) == [("org/some-name.v2:1", ROWS[0])]
    assert list(read_rows("org/name:validation")) == [("org/name:validation:1", ROWS[0])]
    assert list(read_rows("org/name", subset="tiny", split="train[:10%]", revision="v1")) == [("org/name:1", ROWS[0])]
    assert asked == [
        ("org/some-name.v2", None, "train", None), ("org/name", None, "validation", None), ("org/name", "tiny", "train[:10%]", "v1")
    ]  # fmt: skip
    with pytest.raises(DataError, match="names the split a, and split: b another: leave one out"):
        list(read_rows("org/name:a", split="b"))


def test_a_hub_name_without_a_network_is_a_storage_error(monkeypatch):
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert message_of("nobody/nothing", StorageError) == (
        "data: nobody/nothing is no local file or folder, and it could not be fetched from the hub: "
        "Couldn't reach 'nobody/nothing' on the Hub (OfflineModeIsEnabled)"
    )


def test_what_the_hub_says_is_repeated_in_one_line_and_silence_by_its_name(monkeypatch):
    import datasets

    for error, words in ((ValueError("first\nsecond"), "first"), (TimeoutError(), "TimeoutError")):

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(datasets, "load_dataset", fail)
        assert message_of("org/name", StorageError).endswith(f"could not be fetched from the hub: {words}")


def test_a_missing_file_is_never_looked_for_on_the_hub(monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("rows.jsonl", "nowhere/rows.jsonl", "nowhere/Rows.JSON", "data/rows", "/nowhere/rows", "a/b/c.csv"):
        assert message_of(name) == f"data: {name}: no such file or folder (looked in {tmp_path})."


# What is wrong with a whole file


def test_files_that_cannot_be_read_at_all_say_why(tmp_path):
    empty = written(tmp_path, "empty.jsonl", "")
    assert message_of(empty) == f"data: {empty} is empty."
    other = written(tmp_path, "rows.rtf", "x")
    endings = ".json, .jsonl, .ndjson, .csv, .tsv, .parquet, .txt, .md"
    assert message_of(other) == f"data: {other}: the ending '.rtf' is not one of {endings}."
    none = written(tmp_path, "rows", "x")
    assert message_of(none) == f"data: {none}: the ending '' is not one of {endings}."
    torn = written(tmp_path, "rows.parquet", b"PAR1 and no more PAR1")
    assert message_of(torn).startswith(f"data: {torn} is not a Parquet file: ")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("blank.jsonl", "\n \n\t\n"),
        ("bom.jsonl", "\ufeff"),
        ("array.json", " [ ] \n"),
        ("header.csv", "prompt,completion\n"),
        ("blank.csv", "\n\n"),
    ],
)
def test_a_source_without_rows_is_refused(tmp_path, name, content):
    source = written(tmp_path, name, content)
    assert message_of(source) == f"data: {source} holds no examples."


def test_a_source_without_rows_is_refused_beside_one_that_has_some(tmp_path):
    good, bad = written(tmp_path, "good.jsonl", json.dumps(ROWS[0])), written(tmp_path, "bad.json", "[]")
    with pytest.raises(DataError) as caught:
        load_examples((good, bad))
    assert str(caught.value) == f"data: {bad} holds no examples."


def test_two_columns_of_one_name_are_refused(tmp_path):
    import pyarrow
    import pyarrow.parquet

    source = written(tmp_path, "rows.csv", "\ntext,other,text\na,b,c\n")
    assert message_of(source) == f"data: {source}:2 has two columns called 'text'. Rename or remove one."
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table([pyarrow.array(["a"])] * 2, names=["text", "text"]), path)
    assert message_of(str(path)) == f"data: {path} has two columns called 'text'. Rename or remove one."


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_a_file_that_is_not_utf8_says_where(tmp_path, name):
    before = '{"text": "é"}\r\n' * 3000  # more than any buffer
    source = written(tmp_path, name, before.encode() + '{"text": "é"}\n'.encode("latin-1"))
    byte = len(before.encode()) + len('{"text": "')
    assert message_of(source) == (
        f"data: {source}:3001 is not UTF-8 text: byte {byte:,} of the file is 0xe9. Convert it to UTF-8."
    )


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "utf-8"])
def test_utf16_that_says_so_is_read_as_such(tmp_path, encoding):
    """Windows exports it: by its first two bytes there is no doubt."""
    lines = written(tmp_path, "rows.jsonl", "\n".join(json.dumps(row) for row in ROWS).encode(encoding))
    table = written(tmp_path, "rows.tsv", "prompt\tcompletion\nquestion 0\tanswer 0\n".encode(encoding))
    assert [row for _, row in places(lines)] == ROWS
    assert [row for _, row in places(table)] == ROWS[:1]


def test_utf16_that_does_not_say_so_is_refused(tmp_path):
    source = written(tmp_path, "rows.jsonl", '{"text": "é"}'.encode("utf-16-le"))
    assert "is not UTF-8 text" in message_of(source) or "not valid JSON" in refusals(source)[0]


def test_a_byte_order_mark_is_not_part_of_the_first_row(tmp_path):
    for name, content in (
        ("rows.jsonl", json.dumps(ROWS[0])),
        ("rows.json", json.dumps(ROWS[:1])),
        ("rows.csv", "prompt,completion\nquestion 0,answer 0\n"),
    ):
        (row,) = read_rows(written(tmp_path, name, "\ufeff" + content))
        assert row[1] == ROWS[0]


def test_a_parquet_value_that_python_has_no_type_for_says_which_row(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "rows.parquet"
    when = pyarrow.array([0, 9 * 10**18], pyarrow.timestamp("us"))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"], "when": when}), path)
    assert message_of(str(path)) == f"data: {path}:1 cannot be read: date value out of range"


# What is wrong with a row


def test_a_broken_json_line_is_refused_and_the_others_are_read(tmp_path):
    lines = [
        json.dumps(ROWS[0]),
        '{"prompt": "a", "completion": "b"',
        '{"prompt": "a" "completion"}',
        '{"prompt": "a"} {"prompt": "b"}',
        "{'prompt': 'a'}",
        json.dumps(ROWS[1]),
    ]
    source = written(tmp_path, "rows.jsonl", "\n".join(lines) + "\n")
    assert refusals(source) == [
        "rows.jsonl:2: not valid JSON: Expecting ',' delimiter at column 34",
        "rows.jsonl:3: not valid JSON: Expecting ',' delimiter at column 16",
        "rows.jsonl:4: not valid JSON: something follows it at column 17",
        "rows.jsonl:5: not valid JSON: Expecting property name enclosed in double quotes at column 2",
    ]
    assert [row for row in places(source) if isinstance(row[1], dict)] == [(":1", ROWS[0]), (":6", ROWS[1])]


UNCLEAR = {
    '{"text": NaN}': "NaN is not a JSON value",
    '{"text": "a", "n": [-Infinity]}': "-Infinity is not a JSON value",
    '{"text": "a", "text": "b"}': "the key 'text' is given twice",
    '{"text": "a", "x": {"y": 1, "z": 2, "y": 1}}': "the key 'y' is given twice",
    '{"text": "a \\ud83d b"}': "a \\u escape in it is an unpaired surrogate",
    '{"text": "a", "x": ["\\uDC00"]}': "a \\u escape in it is an unpaired surrogate",
}


@pytest.mark.parametrize("row", UNCLEAR)
def test_json_that_can_be_read_in_two_ways_is_refused(tmp_path, row):
    lines = written(tmp_path, "rows.jsonl", f'{row}\n{{"text": "next"}}\n')
    assert refusals(lines) == [f"rows.jsonl:1: not valid JSON: {UNCLEAR[row]}"]
    assert places(lines)[1:] == [(":2", {"text": "next"})]
    array = written(tmp_path, "rows.json", f'[\n{row},\n{{"text": "next"}}]')
    assert refusals(array) == [f"rows.json:2: not valid JSON: {UNCLEAR[row]}"]
    assert places(array)[1:] == [(":3", {"text": "next"})]


def test_escapes_of_whole_characters_are_read(tmp_path):
    source = written(tmp_path, "rows.jsonl", '{"text": "\\ud83d\\ude42 \\u00e9 \\\\ud83d"}')
    assert places(source) == [(":1", {"text": "🙂 é \\ud83d"})]


def test_json_nested_too_deeply_is_refused(tmp_path):
    deep = '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}"
    assert refusals(written(tmp_path, "rows.jsonl", deep)) == ["rows.jsonl:1: not valid JSON: it is nested too deeply"]
    assert refusals(written(tmp_path, "rows.json", f"[{deep}]")) == [
        "rows.json:1: not valid JSON: it is nested too deeply; nothing after it can be read"
    ]


def test_rows_that_are_no_objects_are_refused(tmp_path):
    values = ["12", '"text"', "null", "true", "[1]", "1.5"]
    kinds = ["a number", "a string", "null", "a true/false value", "a list", "a number"]
    said = [f"an example is an object with named columns, not {kind}" for kind in kinds]
    lines = written(tmp_path, "rows.jsonl", "\n".join(values))
    assert refusals(lines) == [f"rows.jsonl:{n}: {reason}" for n, reason in enumerate(said, start=1)]
    array = written(tmp_path, "rows.json", "[" + ",\n".join(values) + "]")
    assert refusals(array) == [f"rows.json:{n}: {reason}" for n, reason in enumerate(said, start=1)]


OBJECTS = {
    "a row": ('{"text": "a"}', [(":1", {"text": "a"})]),
    "a row over several lines": ('{\n  "text": "a"\n}\n', [(":1", {"text": "a"})]),
    "rows over several lines": ('\n{\n "text": "a"\n}\n{\n "text":\n "b"}', [(":2", {"text": "a"}), (":5", {"text": "b"})]),
    "a row of messages": ('{"messages": [{"role": "user"}]}', [(":1", {"messages": [{"role": "user"}]})]),
    "a row of messages by another name": ('{"dialog": [{"from": "gpt"}]}', [(":1", {"dialog": [{"from": "gpt"}]})]),
    "all rows": ('{"data": [{"text": "a"}, {"text": "b"}]}', [(":1", {"text": "a"}), (":1:26", {"text": "b"})]),
    "all rows over several lines": ('{\n"about": 1,\n"rows": [\n{"text": "a"},\n{}]}', [(":4", {"text": "a"}), (":5", {})]),
    "a broken line and a whole one": ('{"text": "a\n{"text": "b"}\n', [(":1", None), (":2", {"text": "b"})]),
}


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize("name", OBJECTS)
def test_objects_are_rows_or_hold_them(tmp_path, name, suffix):
    text, expected = OBJECTS[name]
    found = places(written(tmp_path, f"rows.{suffix}", text))
    assert [(where, row if isinstance(row, dict) else None) for where, row in found] == expected


def test_what_stands_beside_all_rows_is_named(tmp_path):
    from trimtab.data import SourceReport

    report = SourceReport(("x",))
    list(read_rows(written(tmp_path, "rows.json", '{"version": 1, "rows": [{"text": "a"}]}'), report))
    assert report.ignored_columns == {"version"}


@pytest.mark.parametrize(
    "text", ['{"prompt": {"0": "a"}, "completion": {"0": "b"}}', '{\n"prompt": ["a"], "completion": ["b"]}']
)
def test_a_table_by_columns_says_how_to_write_it(tmp_path, text):
    (said,) = refusals(written(tmp_path, "rows.json", text))
    assert said.startswith("rows.json:1: a table by columns")
    assert "by rows" in said


def test_an_array_may_stand_in_a_file_of_lines(tmp_path):
    source = written(tmp_path, "rows.jsonl", json.dumps(ROWS))
    assert [row for _, row in places(source)] == ROWS
    spread = written(tmp_path, "spread.jsonl", json.dumps(ROWS, indent=1))
    assert [row for _, row in places(spread)] == ROWS
    lists = written(tmp_path, "lists.jsonl", "[1]\n[2]\n")
    assert refusals(lists) == [f"lists.jsonl:{n}: an example is an object with named columns, not a list" for n in (1, 2)]


# Packed files, patterns and folders


@pytest.mark.parametrize("packing", ["gz", "zst"])
def test_packed_files_are_read_as_what_is_in_them(tmp_path, packing):
    import gzip

    import pyarrow

    def packed(name, text):
        content = gzip.compress(text.encode()) if packing == "gz" else pyarrow.compress(text.encode(), "zstd", asbytes=True)
        return written(tmp_path, f"{name}.{packing}", content)

    lines = packed("rows.jsonl", "\n".join(json.dumps(row) for row in ROWS))
    assert places(lines) == [(":1", ROWS[0]), (":2", ROWS[1]), (":3", ROWS[2])]
    table = packed("rows.csv", "prompt,completion\nquestion 0,answer 0\n")
    assert places(table) == [(":2", ROWS[0])]
    bad = packed("bad.jsonl", "x")
    Path(bad).write_bytes(Path(lines).read_bytes()[:-9])
    assert message_of(bad).startswith(f"data: {bad} cannot be read: ")
    assert "is not one of" in message_of(packed("rows.parquet", "x"))


def test_a_pattern_stands_for_its_files_in_the_order_of_their_names(tmp_path):
    for number in (2, 0, 1):
        written(tmp_path, f"part-{number}.jsonl", json.dumps(ROWS[number]))
    written(tmp_path, "other.json", "[]")
    assert [row[1] for row in read_rows(f"{tmp_path}/part-*.jsonl")] == ROWS
    assert [row[1] for row in read_rows(f"{tmp_path}/part-[12].jsonl")] == ROWS[1:]
    assert "no such file or folder" in message_of(f"{tmp_path}/shard-*.jsonl")


def test_a_folder_of_shards_is_read_whole(tmp_path):
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "set" / "data").mkdir(parents=True)
    for number, row in enumerate(ROWS):
        table = pyarrow.Table.from_pylist([row])
        pyarrow.parquet.write_table(table, tmp_path / "set" / "data" / f"train-{number:05d}-of-00003.parquet")
    written(tmp_path / "set", "README.md", "# A set")
    written(tmp_path / "set", "dataset_infos.json", "{}")
    assert [row[1] for row in read_rows(str(tmp_path / "set"))] == ROWS


def test_a_folder_of_several_things_says_which_can_be_asked_for_and_that_works(tmp_path):
    (tmp_path / "set" / "data").mkdir(parents=True)
    for split, row in zip(("train-0", "train-1", "test-0"), ROWS, strict=True):
        written(tmp_path / "set" / "data", f"{split}.jsonl", json.dumps(row))
    said = message_of(str(tmp_path / "set"))
    assert "holds several splits (test, train). Choose one, for example:" in said
    (advised,) = re.findall(r"data\.train='(.*train.*)'", said)
    assert [row[1] for row in read_rows(advised)] == ROWS[:2]
    written(tmp_path / "set" / "data", "more.csv", "prompt,completion\nx,y\n")
    assert "holds several kinds of files (.csv, .jsonl)" in message_of(str(tmp_path / "set"))


# Tables as programs export them


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_first_line_says_what_parts_cells(tmp_path, delimiter):
    table = written(tmp_path, "rows.csv", f'prompt{delimiter}completion\n"a, b; c"{delimiter}d\n')
    assert places(table) == [(":2", {"prompt": "a, b; c", "completion": "d"})]


def test_a_space_behind_every_comma_belongs_to_it(tmp_path):
    spaced = written(tmp_path, "rows.csv", 'prompt, completion\na, "b, c"\n')
    assert places(spaced) == [(":2", {"prompt": "a", "completion": "b, c"})]
    plain = written(tmp_path, "plain.csv", "prompt,completion\na, b\n")
    assert places(plain) == [(":2", {"prompt": "a", "completion": " b"})]


def test_an_ending_that_is_not_read_says_what_to_save_it_as(tmp_path):
    assert message_of(written(tmp_path, "rows.xlsx", "PK")).endswith(": save it as CSV.")


# Arrow's nulls

TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
    },
    {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]},
        },
    },
]


def called(name, **arguments):
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]


CALLS = [{"messages": called("weather", city="Oslo"), "tools": TOOLS}, {"messages": called("add", x=1), "tools": TOOLS}]


@pytest.mark.parametrize("way", ["parquet", "datasets"])
def test_what_arrow_fills_up_with_nulls_is_left_out_and_counted(tmp_path, quiet_datasets, way):
    if way == "parquet":
        import pyarrow
        import pyarrow.parquet

        source = str(tmp_path / "rows.parquet")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(CALLS), source)
    else:
        source = str(tmp_path / "saved")
        quiet_datasets.Dataset.from_list(CALLS).save_to_disk(source)
    examples, report = load_examples(source)
    expected, _ = load_examples(written(tmp_path, "rows.jsonl", "\n".join(map(json.dumps, CALLS))))
    assert [(one.messages, one.tools) for one in examples] == [(one.messages, one.tools) for one in expected]
    assert report.removed_nulls > 0
    assert report.plain()["nulls_left_out"] == report.removed_nulls


def test_without_its_pruning_arrow_would_teach_nulls(tmp_path, monkeypatch):
    """The negative control."""
    import pyarrow
    import pyarrow.parquet

    from trimtab.data import arrow_files

    source = str(tmp_path / "rows.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(CALLS), source)
    monkeypatch.setattr(arrow_files, "without_padding", lambda row: (row, 0))
    (first, _), _ = load_examples(source)
    assert first.messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Oslo", "x": None}


def test_nulls_of_ones_own_stay(tmp_path):
    """In JSON all of them; in Arrow, those that the tool's description requires or allows."""
    import pyarrow
    import pyarrow.parquet

    rows = [{"messages": called("add", x=None), "tools": TOOLS}, CALLS[0]]
    lines = written(tmp_path, "rows.jsonl", "\n".join(map(json.dumps, rows)))
    source = str(tmp_path / "rows.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), source)
    for name in (lines, source):
        (first, second), _ = load_examples(name)
        assert first.messages[1]["tool_calls"][0]["function"]["arguments"] == {"x": None}
        assert second.messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Oslo"}
    nullable = {
        "name": "f",
        "parameters": {"properties": {"a": {"type": ["string", "null"]}, "b": {"anyOf": [{"type": "null"}]}, "c": {}}},
    }
    row, removed = without_padding(
        {"tools": [nullable], "calls": [{"name": "f", "arguments": {"a": None, "b": None, "c": None}}], "x": None}
    )
    assert (row["calls"], removed, row["x"]) == ([{"name": "f", "arguments": {"a": None, "b": None}}], 1, None)


@pytest.mark.parametrize(
    ("text", "read", "refused"),
    [
        ('[\n{"text": "a"},\n{"text" "b"},\n{}\n]', 1, ":3: not valid JSON: Expecting ':' delimiter at line 3, column 9"),
        ('[{"text": "a"},\n{"text": "b"', 1, ":2: not valid JSON: Expecting ',' delimiter at line 2, column 13"),
        ('[{"text": "a"},\n{"text":\n"b', 1, ":2: not valid JSON: Unterminated string starting at line 3, column 1"),
        ('[\n{"text": "a"},\n', 1, ":3: not valid JSON: Expecting value at line 3, column 1"),
        ('[\n{"text": "a"}\n', 1, ":2:14: not valid JSON: expected ',' or ']' after a row at line 2, column 14"),
        ('[\n{"text": "a"}\n{"text": "b"}]', 1, ":2:14: not valid JSON: expected ',' or ']' after a row at line 2, column 14"),
        ('[{"text": "a"},]', 1, ":1:16: not valid JSON: Expecting value at column 16"),
        ("[,]", 0, ":1: not valid JSON: Expecting value at column 2"),
        ("[", 0, ":1: not valid JSON: Expecting value at column 2"),
    ],
)  # fmt: skip
def test_a_broken_array_is_read_up_to_where_it_breaks_and_says_that_no_more_was_read(tmp_path, text, read, refused):
    source = written(tmp_path, "rows.json", text)
    assert refusals(source) == [f"rows.json{refused}; nothing after it can be read"]
    assert len(places(source)) == read + 1


def test_what_follows_an_array_is_refused(tmp_path):
    source = written(tmp_path, "rows.json", '[{"text": "a"}]\n\n[{"text": "b"}]')
    assert refusals(source) == ["rows.json:3: text follows the end of the JSON array; it was not read"]
    assert places(source)[0] == (":1", {"text": "a"})


def test_csv_rows_with_too_many_or_too_few_columns_are_refused(tmp_path):
    source = written(tmp_path, "rows.csv", "prompt,completion\na,b\nc\nd,e,f\n,\ng,h\n")
    assert refusals(source) == [
        "rows.csv:3: has 1 columns, and the first line names 2",
        "rows.csv:4: has 3 columns, and the first line names 2",
    ]
    assert [place for place, row in places(source) if isinstance(row, dict)] == [":2", ":5", ":6"]


def test_broken_csv_is_read_up_to_where_it_breaks(tmp_path):
    source = written(tmp_path, "rows.csv", 'prompt,completion\na,b\nc,"d\ne,f\n')
    assert refusals(source) == ["rows.csv:3: not valid CSV: unexpected end of data; nothing after it can be read"]
    source = written(tmp_path, "rows.csv", 'prompt,completion\na,b\nc,"d" e\n')
    assert refusals(source) == ["rows.csv:3: not valid CSV: ',' expected after '\"'; nothing after it can be read"]
    source = written(tmp_path, "rows.csv", 'prompt,"completion\na,b\n')
    assert refusals(source) == ["rows.csv:1: not valid CSV: unexpected end of data; nothing after it can be read"]


def test_a_json_text_is_parsed_as_strictly_as_a_row():
    assert parse_json(' {"a": [1, 2.5, "é", null, true]} \n') == {"a": [1, 2.5, "é", None, True]}
    for text, reason in (
        ("", "Expecting value at column 1"),
        ('{"a": 1,\n"a": 2}', "the key 'a' is given twice"),
        ('{"a":\n1} x', "something follows it at line 2, column 4"),
        ('\n{"a": 1} x', "something follows it at line 2, column 10"),
        ("NaN", "NaN is not a JSON value"),
    ):
        with pytest.raises(ValueError) as caught:  # noqa: PT011 (its words are compared)
            parse_json(text)
        assert str(caught.value) == reason


# Nothing is lost


def _files() -> list[tuple[str, bytes]]:
    import io

    import pyarrow
    import pyarrow.parquet

    shapes = [
        {"messages": [{"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "4 中文🙂"}]},
        {"prompt": "hello", "completion": "world"},
        {"instruction": "say", "input": "", "output": "it", "system": None, "history": [["a", "b"]]},
        {"conversations": [{"from": "human", "value": "\n\n"}, {"from": "gpt", "value": " hello"}], "tools": "[]"},
        {"text": "the answer \\ud83d <|im_end|>"},
    ]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in shapes * 2)
    array = json.dumps(shapes * 2, indent=1, ensure_ascii=False)
    table = 'prompt,completion\nhello,"the\nworld"\n\n"a ""b""",中文\nx,y\n'
    parquet = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"prompt": f"a{n}", "completion": "b"} for n in range(9)]), parquet)
    texts = [("rows.jsonl", lines), ("rows.json", array), ("rows.json", json.dumps(shapes)), ("rows.csv", table)]
    return [
        *((name, text.encode()) for name, text in texts),
        ("rows.tsv", table.replace(",", "\t").encode()),
        ("rows.parquet", parquet.getvalue()),
    ]


FILES = _files()
PIECES = [*(bytes([byte]) for byte in b'\n\r"{}[],\\0\x00\xff\xe4'), b"null", b"NaN", b"\\ud83d", b"<|im_end|>"]

damage = st.lists(
    st.tuples(
        st.sampled_from(["cut", "drop", "insert", "replace", "double", "swap"]), st.floats(0, 1), st.sampled_from(PIECES)
    ),
    max_size=4,
)


def damaged(content: bytes, wounds: list[tuple[str, float, bytes]]) -> bytes:
    for how, where, piece in wounds:
        at = int(where * len(content))
        if how == "cut":
            content = content[:at] or content
        elif how == "drop":
            content = content[:at] + content[at + 7 :]
        elif how == "insert":
            content = content[:at] + piece + content[at:]
        elif how == "replace":
            content = content[:at] + piece + content[at + len(piece) :]
        elif how == "double":
            content = content[: at + 20] + content[at:]
        else:
            content = content[at:] + content[:at]
    return content


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(which=st.sampled_from(FILES), wounds=damage, truncate=st.booleans(), length=st.integers(2, 60))
def test_rows_in_are_rows_used_and_refused_whatever_happens_to_a_file(tmp_path, which, wounds, truncate, length):
    name, content = which
    content = damaged(content, wounds)
    source = written(tmp_path, name, content)
    base = FAMILIES["chatml"].make()
    config = DataConfig(
        train=(source,), eval=0.0, bad_rows="skip", max_length=length, overlong="truncate" if truncate else "refuse"
    )
    try:
        rows = list(read_rows(source))
    except TrimtabError:
        return
    try:
        loaded = load_data(config, base, None, seed=0)
    except DataError as error:
        refused_all = f"0 used, {len(rows)} rejected" in str(error)
        assert refused_all
        return
    (report,) = loaded.reports
    assert len(rows) == report.used + len(report.rejected) == report.total
    if name == "rows.jsonl":  # counted by hand
        lines = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n").split("\n")
        assert len(rows) == sum(bool(line.strip()) for line in lines)
    assert len({row[0] for row in rows}) == len(rows)
    assert len({row.where for row in loaded.train}) == report.used
    assert {row.where for row in loaded.train} | {refusal.where for refusal in report.rejected} == {row[0] for row in rows}
    for sequence in loaded.train:
        assert sequence.target_indices
        assert sequence.target_indices[0] > 0
        assert sequence.target_indices[-1] == len(sequence.ids) - 1 < length
    json.dumps(loaded.plain(), allow_nan=False, ensure_ascii=False).encode()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(content=st.binary(max_size=200), name=st.sampled_from([name for name, _ in FILES]))
def test_any_bytes_under_any_ending_are_read_or_refused(tmp_path, content, name):
    source = written(tmp_path, name, content)
    try:
        examples, report = load_examples(source)
    except TrimtabError:
        return
    assert len(examples) + len(report.rejected) == len(list(read_rows(source)))


def test_a_file_that_a_disk_does_not_give_says_why(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n')
    monkeypatch.setattr(text_files, "open", Mock(side_effect=OSError(errno.EIO, os.strerror(errno.EIO))), raising=False)
    assert message_of(str(path)) == f"data: {path} cannot be read: Input/output error."


def test_a_file_that_is_mended_while_it_is_read_is_not_taken_for_what_it_was(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "\xff", "completion": "b"}\n')
    real = text_files.not_utf8

    def mended(broken):
        path.write_bytes(b"{}")
        return real(broken)

    monkeypatch.setattr(reading, "not_utf8", mended)
    assert message_of(str(path)) == f"data: {path} changed while it was read."


def test_a_row_of_an_array_that_is_not_the_first_in_its_line_is_placed_by_its_column(tmp_path):
    source = written(tmp_path, "rows.json", '[\n\n{"text": "a"}, {"text": "b"},\n  {"text": "c"}\n, 7, {"text": "d"}]')
    assert [where for where, _ in places(source)] == [":3", ":3:16", ":4", ":5", ":5:6"]
