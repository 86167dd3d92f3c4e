"""Corpora: every token is a target once, in an order by number alone; what is on disk is what was tokenized, whatever happens meanwhile."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from disks import small_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from templates import CORPUS, FAMILIES, plain

from trimtab.core.errors import ArtifactError, DataError, RecipeError, StorageError
from trimtab.core.locks import file_lock
from trimtab.data import DataConfig, check_corpus, corpus_documents, corpus_load, corpus_tokens, first_examples, load_data
from trimtab.data.examples import held_out_examples
from trimtab.data.order import Permutation
from trimtab.run.recipe import Recipe

WORDS = " ".join(CORPUS).split()
BASES = {
    "a BOS": lambda: FAMILIES["llama3"].make(),
    "pieces": lambda: FAMILIES["mistral"].make(),
    "no BOS": lambda: FAMILIES["chatml"].make(),
    "an EOS behind": lambda: plain(bos=True, eos_behind=True),
}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A cache folder of the test's own, and small shards."""
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(corpus_tokens, "SHARD_TOKENS", 500)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def texts(count, seed=0, longest=60):
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, longest))) for _ in range(count)]


def write_texts(path, some):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in some))


def load(base=None, **settings):
    settings = {"train": "texts.jsonl", "corpus": True, "max_length": 32, "eval": 0, **settings}
    return load_data(DataConfig(**settings), base or BASES["no BOS"](), None, 0)


def in_memory(base=None, **settings):
    settings = {"train": "texts.jsonl", "max_length": 32, "overlong": "split", "eval": 0, **settings}
    return load_data(DataConfig(**settings), base or BASES["no BOS"](), None, 0)


def epoch(corpus, number=0):
    return [row for block in range(len(corpus)) for row in corpus.rows(number * len(corpus) + block)]


def predicted(rows):
    """How often each token is a target, by its document and the token before it."""
    return Counter((row.source, row.where, row.ids[t - 1], row.ids[t]) for row in rows for t in row.target_indices)


def shards(home):
    return {str(path.relative_to(home)): path.read_bytes() for path in sorted((home / "cache").rglob("*")) if path.is_file()}


# The order


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.text(max_size=3))
def test_an_order_has_every_number_once(count, seed):
    order = Permutation(count, seed)
    assert sorted(order[place] for place in range(count)) == list(range(count))


def test_an_order_is_by_the_seed_and_near_to_random():
    assert [Permutation(1000, "a")[n] for n in range(50)] == [Permutation(1000, "a")[n] for n in range(50)]
    one, other = ([Permutation(1000, seed)[n] for n in range(1000)] for seed in ("a", "b"))
    assert sum(a == b for a, b in zip(one, other, strict=True)) < 10
    for order in (one, other):
        assert abs(np.corrcoef(order, range(1000))[0, 1]) < 0.1
        assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.1
    assert Permutation(10**12, "a")[10**12 - 1] < 10**12


# The tokens, beside those of texts in memory


@pytest.mark.parametrize("name", BASES)
def test_every_token_is_a_target_once_an_epoch_as_in_memory(home, name):
    base = BASES[name]()
    write_texts(home / "texts.jsonl", texts(120))
    ours, theirs = load(base, eval=7), in_memory(base, eval=7)
    assert ours.eval == theirs.eval
    assert ours.corpus.targets == sum(len(row.target_indices) for row in theirs.train)
    for number in (0, 1):
        rows = epoch(ours.corpus, number)
        assert predicted(rows) == predicted(theirs.train)
        assert all(2 <= len(row.ids) == row.full_length <= 32 for row in rows)
    assert [row.ids for row in epoch(ours.corpus)] != [row.ids for row in epoch(ours.corpus, 1)]
    assert len(shards(home)) > 3 * 4


def test_blocks_are_full_and_cut_where_documents_end(home):
    write_texts(home / "texts.jsonl", texts(50))
    base = BASES["no BOS"]()
    corpus = load(base).corpus
    whole = [row.ids for row in in_memory(base, max_length=None, overlong="refuse").train]
    joined, starts = [t for ids in whole for t in ids], {sum(map(len, whole[:n])) for n in range(50)}
    blocks = corpus.sources[""]
    for number in range(len(blocks)):
        first, last = number * 31, min(number * 31 + 32, len(joined))
        cuts = [first, *sorted(s for s in starts if first < s < last), last]
        expected = [joined[a:b] for a, b in pairwise(cuts) if b - a > 1]
        assert [row.ids for row in blocks.rows(number)] == expected
        assert all(row.target_indices == list(range(1, len(row.ids))) for row in blocks.rows(number))
    assert len(blocks) == -(-(len(joined) - 1) // 31)


def test_shards_change_nothing(home, monkeypatch):
    write_texts(home / "texts.jsonl", texts(80))
    small = epoch(load(eval=3).corpus)
    monkeypatch.setattr(corpus_tokens, "SHARD_TOKENS", 1 << 24)
    assert epoch(load(eval=3).corpus) == small


def test_named_sources_and_weights(home):
    write_texts(home / "few.jsonl", texts(20, 1))
    write_texts(home / "many.jsonl", texts(90, 2))
    named = {"few": {"path": "few.jsonl"}, "many": {"path": "many.jsonl"}}
    rows = epoch(load(train=named).corpus)
    assert predicted(rows) == predicted(in_memory(train=named).train)
    weighted = {name: {**source, "weight": weight} for (name, source), weight in zip(named.items(), (3, 1), strict=True)}
    data = load(train=weighted, eval=4)
    sizes = {name: len(blocks) for name, blocks in data.corpus.sources.items()}
    assert data.corpus.per_epoch["few"] == pytest.approx(0.75 * sum(sizes.values()), abs=1)
    assert data.shares["few"].held_out == sum(row.source == "few" for row in data.eval) > 0
    often = Counter()
    for number in range(4):
        often += predicted(row for row in epoch(data.corpus, number) if row.source == "few")
    once = predicted(row for block in range(sizes["few"]) for row in data.corpus.sources["few"].rows(block))
    times = {often[key] / once[key] for key in once}
    assert max(times) - min(times) <= 1, "a source is gone through evenly"
    weighted["few"]["weight"] = 1e-9
    with pytest.raises(DataError, match=r"data.train.few.weight: its share of an epoch .* is less than one"):
        load(train=weighted)


def test_where_sources_lie_and_what_they_are(home, monkeypatch):
    datasets = pytest.importorskip("datasets")
    some = texts(40, 3)
    write_texts(home / "texts.jsonl", some)
    expected = epoch(load().corpus)
    (home / "more").mkdir()
    for name, content in (("texts.jsonl", some[:20]), ("z.jsonl", some[20:])):
        write_texts(home / "more" / name, content)
    (home / "texts.json.gz").write_bytes(gzip.compress(json.dumps([{"text": text} for text in some]).encode()))
    (home / "texts.txt").write_text("\n<|endoftext|>\n".join(some))
    datasets.Dataset.from_list([{"text": text} for text in some]).to_parquet("texts.parquet")
    datasets.Dataset.from_list([{"text": text} for text in some]).save_to_disk("saved")
    for train in ("more", "more/*.jsonl", "texts.json.gz", "texts.txt", "texts.parquet", "saved"):
        rows = epoch(load(train=train).corpus)
        assert [row.ids for row in rows] == [row.ids for row in expected], train
        assert {row.where.rpartition("/")[2].partition(":")[0] for row in rows} <= {"texts.jsonl", "z.jsonl", Path(train).name}
        assert {row.where for row in rows} == {row.where for row in in_memory(train=train).train}, train
    (home / "hub").mkdir()
    write_texts(home / "hub" / "train.jsonl", some)
    asked = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *a, _load=datasets.load_dataset, **k: asked.append(k) or _load(*a, **k)
    )
    monkeypatch.setenv("HF_DATASETS_CACHE", str(home / "hf"))
    rows = epoch(load(train={"stream": {"path": "hub", "split": "train", "limit": 25}}).corpus)
    assert [k["streaming"] for k in asked] == [True]
    write_texts(home / "texts.jsonl", some[:25])
    assert [row.ids for row in rows] == [row.ids for row in epoch(load(train={"stream": {"path": "texts.jsonl"}}).corpus)]


def test_a_limit_takes_the_first_rows_over_all_files(home):
    (home / "more").mkdir()
    for number in range(3):
        write_texts(home / "more" / f"{number}.jsonl", texts(10, number))
    rows = epoch(load(train={"a": {"path": "more", "limit": 14}, "b": {"path": "more/2.jsonl", "limit": 3}}).corpus)
    assert {(row.source, row.where.rpartition("/")[2]) for row in rows} == {
        *(("a", f"0.jsonl:{n}") for n in range(1, 11)), *(("a", f"1.jsonl:{n}") for n in range(1, 5)),
        *(("b", f"2.jsonl:{n}") for n in range(1, 4)),
    }  # fmt: skip


def test_validation_examples_are_found_again_and_a_file_of_them_is_read(home):
    write_texts(home / "texts.jsonl", texts(60))
    write_texts(home / "held.jsonl", texts(9, 5))
    for own, count in (({"eval": 5}, 5), ({"eval": "held.jsonl"}, 9), ({"eval": 0.05}, 3)):
        config = DataConfig(train="texts.jsonl", corpus=True, max_length=32, **own)
        data = load_data(config, BASES["no BOS"](), None, 0)
        found = held_out_examples(config, data.plain())
        assert len(found) == count
        assert {example.where for example in found} == {row.where for row in data.eval}
        assert not {row.where for row in epoch(data.corpus)} & {row.where for row in data.eval}
    data = load_data(DataConfig(train="texts.jsonl", corpus=True), BASES["no BOS"](), 64, 0)
    assert (data.corpus.length, len({row.where for row in data.eval})) == (64, 1)


def test_a_hash_says_whether_a_validation_document_is_trained_on(home):
    some = texts(30)
    write_texts(home / "texts.jsonl", some)
    base = BASES["no BOS"]()

    def finding():
        config = DataConfig(train="texts.jsonl", corpus=True, max_length=32, eval=3)
        data = load_data(config, base, None, 0)
        findings = check_corpus(data, first_examples(config, 9, 0), base)
        return next(finding for finding in findings if finding.name == "held out"), data

    clean, data = finding()
    assert clean.status == "good"
    place = int(data.eval[0].where.rpartition(":")[2]) - 1
    write_texts(home / "texts.jsonl", [*some[:place], some[place - 1], *some[place + 1 :]])
    leaked, _ = finding()
    assert (leaked.status, leaked.facts["learned_too"]) == ("note", [f"texts.jsonl:{place + 1}"])


# On disk


def test_what_is_damaged_is_made_again_and_nothing_else(home, monkeypatch):
    write_texts(home / "texts.jsonl", texts(200))
    rows, whole = epoch(load().corpus), shards(home)
    tokens = sorted(path for path in (home / "cache").rglob("*.tokens"))
    assert len(tokens) > 4
    said = []
    monkeypatch.setattr(corpus_tokens.CorpusFolder, "write", lambda self, number, *more, _write=corpus_tokens.CorpusFolder.write: (
        said.append(number) or _write(self, number, *more)
    ))  # fmt: skip
    for number, ending, damage in (
        (1, "tokens", lambda content: content[:7] + bytes([content[7] ^ 1]) + content[8:]),
        (2, "tokens", lambda content: content[:-2]),
        (0, "documents", lambda content: content + b"\0"),
        (3, "json", lambda content: content.replace(b'"used": ', b'"used": 1')),
        (len(tokens) - 1, "tokens", lambda content: b""),
    ):
        path = tokens[number].with_suffix(f".{ending}")
        path.write_bytes(damage(path.read_bytes()))
        assert epoch(load().corpus) == rows
        assert (said, shards(home)) == ([number], whole), ending
        said.clear()
    assert epoch(load().corpus) == rows
    assert said == []


def test_a_shard_that_goes_away_while_it_is_used_is_an_error(home, monkeypatch):
    write_texts(home / "texts.jsonl", texts(200))
    corpus = load().corpus
    monkeypatch.setattr(corpus.sources[""].files, "_open", {})
    next((home / "cache").rglob("000002.tokens")).write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"000002.tokens: a shard of the tokenized corpus is gone or damaged"):
        epoch(corpus)


def test_other_texts_tokenizers_and_readings_are_other_corpora(home):
    write_texts(home / "texts.jsonl", texts(30))
    digests = {load().digest, load(BASES["a BOS"]()).digest}
    folders = lambda: len(list((home / "cache" / "corpora").iterdir()))  # noqa: E731
    assert (len(digests), folders()) == (2, 2)
    digests |= {load(max_length=64).digest, load(eval=2).digest}
    assert (len(digests), folders()) == (4, 2), "blocks and validation are made of the same tokens"
    write_texts(home / "texts.jsonl", texts(30, 1))
    assert load().digest not in digests
    assert folders() == 3
    (home / "texts.jsonl").rename(home / "moved.jsonl")
    (home / "else").mkdir()
    (home / "moved.jsonl").rename(home / "else" / "texts.jsonl")
    assert load(train="else/texts.jsonl").digest == load(train="else").digest
    assert folders() == 3, "it does not matter where files lie"


def test_a_file_that_changes_while_it_is_read_is_refused(home, monkeypatch):
    write_texts(home / "texts.jsonl", texts(30))
    made = corpus_documents.TextEncoder.documents

    def slow(self, batch):
        time.sleep(0.01)
        os.utime(home / "texts.jsonl")
        return made(self, batch)

    monkeypatch.setattr(corpus_documents.TextEncoder, "documents", slow)
    monkeypatch.setattr(corpus_documents, "BATCH_ROWS", 4)
    with pytest.raises(DataError, match=r"texts.jsonl changed while it was read"):
        load()


def test_a_full_disk_loses_the_last_shard_alone(home, monkeypatch):
    write_texts(home / "texts.jsonl", texts(3000, longest=120))
    monkeypatch.setattr(corpus_tokens, "SHARD_TOKENS", 20_000)
    expected = load().digest
    with small_disk(home / "disk") as disk:
        monkeypatch.setenv("TRIMTAB_CACHE", str(disk))
        with pytest.raises(StorageError, match=r"No space left on device.*TRIMTAB_CACHE"):
            load()
        (made,) = (disk / "corpora").iterdir()
        kept = {path.name: path.read_bytes() for path in made.iterdir() if path.suffix}
        assert len(kept) >= 3
        roomy = home / "roomy"
        (roomy / "corpora" / made.name).mkdir(parents=True)
        for name, content in kept.items():
            (roomy / "corpora" / made.name / name).write_bytes(content)
    monkeypatch.setenv("TRIMTAB_CACHE", str(roomy))
    assert load().digest == expected


PROGRAM = """
import sys
from templates import FAMILIES
from trimtab.data import DataConfig, corpus_tokens, load_data
corpus_tokens.SHARD_TOKENS = 500
data = load_data(DataConfig(train="texts.jsonl", corpus=True, max_length=32, eval=0), FAMILIES["chatml"].make(), None, 0)
sys.stdout.write(data.digest)
"""


def start():
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
    )  # fmt: skip


def test_a_corpus_that_is_killed_and_made_by_two_is_the_same(home, monkeypatch):
    write_texts(home / "texts.jsonl", texts(1500))
    expected, whole = load().digest, shards(home)
    monkeypatch.setenv("TRIMTAB_CACHE", str(home / "killed"))
    killed = start()
    while len(list((home / "killed").rglob("*.json"))) < 5 and killed.poll() is None:
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    next((home / "killed" / "corpora").iterdir()).joinpath(".writing-1-000009.tokens").write_bytes(b"a part")
    kept = len(list((home / "killed").rglob("*.json")))
    assert 5 <= kept < len([name for name in whole if name.endswith(".json")])
    both = [start(), start()]
    assert [(process.communicate(timeout=100)[0], process.returncode) for process in both] == [(expected, 0)] * 2
    assert not list((home / "killed").rglob(".writing-*"))
    found = {
        path.name: path.read_bytes()
        for path in (home / "killed").rglob("*")
        if path.suffix in (".tokens", ".documents", ".json")
    }
    assert found == {name.rpartition("/")[2]: content for name, content in whole.items() if not name.endswith(".lock")}


def test_a_process_waits_for_another_one(home, monkeypatch):
    write_texts(home / "texts.jsonl", texts(30))
    expected = load().digest
    (folder,) = (home / "cache" / "corpora").iterdir()
    next(folder.glob("*.json")).unlink()
    waiting = []

    def on_stage(said):
        waiting.append(said)
        if said.startswith("waiting for another process"):
            lock.__exit__(None, None, None)

    lock = file_lock(folder / corpus_tokens.LOCK)
    lock.__enter__()
    config = DataConfig(train="texts.jsonl", corpus=True, max_length=32, eval=0)
    assert load_data(config, BASES["no BOS"](), None, 0, on_stage=on_stage).digest == expected
    assert waiting[0] == "waiting for another process that tokenizes the same corpus"


# What is refused


def test_documents_that_cannot_be_used_are_named_or_left_out(home):
    some = [json.dumps({"text": text}) for text in texts(100)]
    some[40:40] = ["{no json", json.dumps({"text": " "}), json.dumps({"messages": [{"role": "user", "content": "a"}]})]
    some[70:70] = [json.dumps({"prompt": "a", "completion": "b"})]
    (home / "texts.jsonl").write_text("\n".join(some))
    with pytest.raises(DataError) as caught:
        load()
    for part in ("texts.jsonl:41: not valid JSON", "texts.jsonl:42: text is empty", "data.bad_rows=skip"):
        assert part in str(caught.value)
    data = load(bad_rows="skip")
    assert [where for where, _ in data.reports[0].rejected] == [f"texts.jsonl:{n}" for n in (41, 42, 43, 71)]
    assert data.reports[0].total == 104
    assert "is a conversation, and a corpus is of plain texts" in dict(data.reports[0].rejected)["texts.jsonl:71"]
    with pytest.raises(DataError, match="not valid JSON"):
        load()
    (home / "texts.jsonl").write_text("\n".join([json.dumps({"text": ""})] * 9))
    with pytest.raises(DataError, match=r"no document of texts.jsonl can be used(.|\n)*and 8 more: text is empty"):
        load(bad_rows="skip")


def test_many_rejected_documents_are_counted(home, monkeypatch):
    from trimtab.data import corpus_files

    monkeypatch.setattr(corpus_files, "LISTED", 3)
    (home / "texts.jsonl").write_text("\n".join([json.dumps({"text": ""})] * 9 + [json.dumps({"text": "hello world"})] * 3))
    (report,) = load(bad_rows="skip").reports
    assert (report.total, len(report.rejected), report.unlisted, report.used) == (12, 3, 6, 3)
    assert "3 used, 9 rejected" in str(report)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"duplicates": "remove"}, "duplicates: those of a corpus are not searched for"),
        ({"overlong": "truncate"}, "overlong: truncate: the texts of a corpus are cut into blocks"),
        ({"overlong": "drop"}, "overlong: drop: the texts of a corpus are cut into blocks"),
        ({"max_length": 15}, "max_length: the blocks of a corpus have at least 16 tokens"),
        ({"prompt": "{a}"}, "prompt: a corpus is of plain texts, which have no prompt"),
        ({"train": {"a": {"path": "a", "completion": "{b}"}}}, "completion: a corpus is of plain texts"),
    ],
)
def test_keys_that_cannot_be_combined_are_refused(section, message):
    with pytest.raises(RecipeError, match=message):
        DataConfig(**{"train": "a", "corpus": True, **section})
    DataConfig(**{"train": "a", **section})


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"objective": "dpo"}, "data.corpus: dpo compares or judges answers"),
        ({"objective": "kto"}, "data.corpus: kto compares or judges answers"),
        ({"eval": {"samples": 2}}, r"eval.samples: the documents of a corpus \(data.corpus\) are plain texts"),
    ],
)
def test_recipes_that_cannot_be_a_corpus_are_refused(part, message):
    Recipe.parse({"data": {"train": "a"}, **part})
    with pytest.raises(RecipeError, match=message):
        Recipe.parse({"data": {"train": "a", "corpus": True}, **part})


def test_what_would_take_memory_or_may_change_is_refused(home, monkeypatch):
    write_texts(home / "texts.jsonl", texts(30))
    monkeypatch.setattr(corpus_load, "MOST_HELD_OUT", 200)
    with pytest.raises(DataError, match=r"data.eval: 20 holds out 20 documents with [\d,]+ tokens.*data.eval=\d+\.$"):
        load(eval=20)
    write_texts(home / "held.jsonl", texts(30, 1))
    with pytest.raises(DataError, match=r"data.eval: it names texts with [\d,]+ tokens.*data.eval=\d+\.$"):
        load(eval="held.jsonl")
    with pytest.raises(DataError, match=r"data.eval: 30 would hold out 30 of 30"):
        load(eval=30)
    with pytest.raises(DataError, match=r"org/name is tokenized once, and its main branch may change"):
        load(train="org/name")
    with pytest.raises(DataError, match=r"nowhere.jsonl: no such file"):
        load(train="nowhere.jsonl")
    monkeypatch.setattr(corpus_documents, "LONGEST", 300)
    (home / "whole.json").write_text(json.dumps([{"text": text} for text in texts(30)]))
    with pytest.raises(DataError, match=r"whole.json is read whole, because it has no row a line"):
        load(train="whole.json")
    (home / "long.txt").write_text("\n".join(texts(30)))
    with pytest.raises(DataError, match=r"long.txt:1: a document of more than 300 characters. Part documents"):
        load(train="long.txt")
    write_texts(home / "long.jsonl", ["a", "a", "a" * 301])
    with pytest.raises(DataError, match=r"has 301 characters, more than 300: divide it"):
        load(train="long.jsonl")
