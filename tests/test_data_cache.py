"""Tokens that are kept are those that would be made now, of every row, or they are made."""

import json
import os
import shutil
from datetime import timedelta

import pytest
from templates import FAMILIES

from trimtab.base import Base, fingerprint
from trimtab.core.errors import DataError, StorageError
from trimtab.data import DataConfig, load_data, token_cache

CLOCK = "{{ strftime_now('%d %b %Y') }}"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A cache folder of the test's own, and small data kept too."""
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(token_cache, "MIN_BYTES", 0)
    return tmp_path


def rows_file(home, count=12, name="rows.jsonl", answer="answer", bad=True):
    rows = [{"prompt": f"question {n}", "completion": f"{answer} {n}", "mark": n} for n in range(count)]
    lines = [json.dumps(row) for row in rows]
    if bad:
        lines[3:3] = ["{not json", json.dumps({"prompt": "2+2?", "completion": "<|im_end|>"})]
    (home / name).write_text("\n".join(lines))
    return str(home / name)


def base():
    return Base(FAMILIES["chatml"].make().model, FAMILIES["chatml"].make().tokenizer)


def loaded(source, on=None, context=None, **settings):
    return load_data(DataConfig(**{"train": source, "bad_rows": "skip", "eval": 3, **settings}), on or base(), context, seed=0)


def kept(home):
    return sorted((home / "cache" / "tokens").glob("*")) if (home / "cache" / "tokens").exists() else []


def made_again(monkeypatch):
    """Counts how often rows are tokenized."""
    counts = []
    real = load_data.__globals__["tokenize_examples"]
    monkeypatch.setitem(load_data.__globals__, "tokenize_examples", lambda *a, **k: counts.append(1) or real(*a, **k))
    return counts


def test_a_second_load_gives_the_same_rows_and_the_same_account_without_a_tokenizer(home, monkeypatch):
    source, counts = rows_file(home), made_again(monkeypatch)
    first = loaded(source)
    monkeypatch.setattr(Base, "encode", lambda *_, **__: pytest.fail("tokenized again"))
    second = loaded(source)
    assert second == first
    assert second.plain() == first.plain()
    assert len(counts) == 1
    assert [refusal.where for refusal in second.reports[0].rejected] == [f"{source}:4", f"{source}:5"]
    assert second.reports[0].ignored_columns == {"mark"}
    other = loaded(source, eval=5)  # what is held out is chosen from the same rows
    assert (len(counts), len(other.eval)) == (1, 5)


def test_rows_that_cannot_be_used_stop_every_run(home):
    source = rows_file(home)
    messages = []
    for _ in range(2):
        with pytest.raises(DataError) as caught:
            loaded(source, bad_rows="stop")
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert len(kept(home)) == 1


def another_content(home, source, on):
    rows_file(home, answer="reply")
    return {}


def another_template(home, source, on):
    on.tokenizer.chat_template = on.tokenizer.chat_template.replace("user", "human") + "{# changed #}"
    return {}


def another_tokenizer(home, source, on):
    on.tokenizer.add_special_tokens({"additional_special_tokens": ["question"]})
    return {}


def another_library(home, source, on):
    return {"patch": (fingerprint, "version", lambda name: f"{name} 99")}


def another_code(home, source, on):
    return {"patch": (token_cache, "code_hash", lambda *_: "other")}


def another_name(home, source, on):
    shutil.copy(source, home / "copy.jsonl")
    return {"train": str(home / "copy.jsonl")}


CHANGES = {
    "content": another_content,
    "template": another_template,
    "tokenizer": another_tokenizer,
    "library": another_library,
    "code": another_code,
    "name": another_name,
    "columns": lambda *_: {"columns": {"system": "prompt", "prompt": "mark"}},
    "max_length": lambda *_: {"max_length": 14, "overlong": "truncate"},
    "overlong": lambda *_: {"overlong": "truncate"},
    "context": lambda *_: {"context": 14},
    "a file more": lambda home, source, on: {"train": (source, rows_file(home, 2, "more.jsonl", bad=False))},
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_decides_the_tokens_has_them_made_anew(home, monkeypatch, change):
    source, counts, on = rows_file(home), made_again(monkeypatch), base()
    on.tokenizer = copy_of(on.tokenizer)
    loaded(source, on)
    asked = {"train": source, **CHANGES[change](home, source, on)}
    if "patch" in asked:
        monkeypatch.setattr(*asked.pop("patch"))

    def load():
        try:
            return loaded(on=on, source=asked["train"], **{k: v for k, v in asked.items() if k != "train"})
        except DataError as error:
            return str(error)  # no row can be used so

    changed = load()
    assert len(counts) == 2
    shutil.rmtree(home / "cache")
    assert load() == changed


def copy_of(tokenizer):
    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    specials = tokenizer.special_tokens_map
    return type(tokenizer)(tokenizer_object=backend, chat_template=tokenizer.chat_template, **specials)


def test_an_unchanged_copy_of_the_tokenizer_is_the_same_one(home, monkeypatch):
    source, counts = rows_file(home), made_again(monkeypatch)
    on = base()
    on.tokenizer = copy_of(on.tokenizer)
    loaded(source)
    loaded(source, on)
    assert len(counts) == 1


@pytest.mark.parametrize("where", range(0, 100, 7))
def test_a_damaged_file_is_made_anew(home, monkeypatch, where):
    source = rows_file(home)
    first = loaded(source)
    (path,) = kept(home)
    content = bytearray(path.read_bytes())
    content[len(content) * where // 100] ^= 4
    path.write_bytes(content)
    counts = made_again(monkeypatch)
    assert loaded(source) == first
    assert len(counts) == 1
    assert loaded(source) == first
    assert len(counts) == 1


@pytest.mark.parametrize("left", [0, 1, 8, 200, -1])
def test_a_torn_file_is_made_anew(home, left):
    source = rows_file(home)
    first = loaded(source)
    (path,) = kept(home)
    path.write_bytes(path.read_bytes()[:left])
    assert loaded(source) == first


def test_damage_would_be_seen_in_the_rows_if_nobody_looked(home, monkeypatch):
    """The control of the two above."""
    monkeypatch.setattr(token_cache, "_digest", lambda tensors: "any")
    source = rows_file(home)
    first = loaded(source)
    (path,) = kept(home)
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    path.write_bytes(content[:start] + bytes([content[start] ^ 4]) + content[start + 1 :])
    assert loaded(source).digest != first.digest


def test_tokens_of_a_template_that_writes_the_date_are_kept_for_the_runs_own_moment(home):
    on, source = base(), rows_file(home)
    on.tokenizer.chat_template, before = CLOCK + on.tokenizer.chat_template, on.tokenizer.chat_template
    try:
        loaded(source, on)
        assert loaded(source, on)
        assert len(kept(home)) == 1
        on.moment += timedelta(days=1)
        loaded(source, on)
    finally:
        on.tokenizer.chat_template = before
    assert len(kept(home)) == 2


def test_a_file_that_changes_while_it_is_read_is_not_kept(home, monkeypatch):
    source = rows_file(home)
    real = load_data.__globals__["tokenize_examples"]

    def changing(*given, **settings):
        made = real(*given, **settings)
        with open(source, "a") as file:
            file.write("\n")
        return made

    monkeypatch.setitem(load_data.__globals__, "tokenize_examples", changing)
    loaded(source)
    assert kept(home) == []


def test_little_data_is_not_kept(home, monkeypatch):
    monkeypatch.setattr(token_cache, "MIN_BYTES", 1_000_000)
    loaded(rows_file(home))
    assert kept(home) == []


def test_what_was_asked_for_longest_ago_goes_first(home, monkeypatch):
    monkeypatch.setattr(token_cache, "MAX_FILES", 2)
    sources = [rows_file(home, name=f"{n}.jsonl", answer=str(n)) for n in range(3)]
    for age, source in ((90, sources[0]), (60, sources[1])):
        loaded(source)
        new = max(kept(home), key=lambda path: path.stat().st_mtime)
        os.utime(new, (new.stat().st_atime - age, new.stat().st_mtime - age))
    loaded(sources[0])  # used again
    counts = made_again(monkeypatch)
    loaded(sources[2])
    assert len(kept(home)) == 2
    loaded(sources[0])
    assert len(counts) == 1
    loaded(sources[1])
    assert len(counts) == 2


def test_without_room_for_it_rows_are_tokenized_all_the_same(home, monkeypatch):
    source = rows_file(home)
    first = loaded(source)
    shutil.rmtree(home / "cache")

    def full(path, content):
        raise StorageError(f"{path}: no space")

    monkeypatch.setattr(token_cache, "write_bytes", full)
    assert loaded(source) == first


def test_folders_and_several_files_are_kept_as_a_whole(home, monkeypatch):
    import datasets

    datasets.Dataset.from_list([{"prompt": "a", "completion": str(n)} for n in range(9)]).save_to_disk(str(home / "saved"))
    counts = made_again(monkeypatch)
    sources = (str(home / "saved"), rows_file(home))
    assert loaded(sources) == loaded(sources)
    assert len(counts) == 1


def test_sources_are_kept_one_by_one_so_that_another_mix_of_them_is_read_at_once(home, monkeypatch):
    a, b, c = (rows_file(home, name=f"{name}.jsonl", answer=name) for name in "abc")
    counts = made_again(monkeypatch)

    def of(seed=0, **sources):
        config = DataConfig(train=sources, bad_rows="skip", eval=3)
        return len(load_data(config, base(), None, seed).train), counts.count(1)

    assert of(a=a, b=b) == (21, 2)
    assert of(seed=1, b={"path": b, "weight": 2.0}, first={"path": a, "weight": 1.0}) == (21, 2)
    assert of(a=a, b=b, c=c) == (33, 3)
    assert of(a=a, b={"path": b, "limit": 5})[1] == 4
    assert of(a=a, b={"path": b, "limit": 5})[1] == 4
    assert of(seed=1, a=a, b={"path": b, "limit": 5})[1] == 5  # another sample
    assert of(a=a, b={"path": b, "columns": {"prompt": "completion", "completion": "prompt"}})[1] == 6
    rows = load_data(DataConfig(train={"x": a, "y": b}, bad_rows="skip", eval=0), base(), None, 0).train
    assert [row.source for row in rows] == ["x"] * 12 + ["y"] * 12
