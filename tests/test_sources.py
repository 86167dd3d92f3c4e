"""Named sources: what each contributes to an epoch, what is held out of it and how it is evaluated; and objects in memory as a source."""

import itertools
import json
import math
from collections import Counter
from fractions import Fraction
from pathlib import Path

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from templates import FAMILIES
from worlds import ROWS, dataset_card, write_rows

import trimtab as package
from trimtab.core.errors import DataError, RecipeError
from trimtab.data import DataConfig, check_first_examples, held_out_examples, load_data, order, plan_steps
from trimtab.data.example import TokenRow
from trimtab.data.held_out import places_held_out
from trimtab.evaluate import score_loss
from trimtab.objectives.dpo import DPO
from trimtab.run.recipe import Recipe
from trimtab.testing import tiny_base

BASE = FAMILIES["chatml"].make()


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()


def plainly(text):
    """What a terminal says, without its line breaks."""
    return " ".join(text.split())


def numbered(sizes):
    """Rows of sources of these sizes; each row's place is its index."""
    names = [name for name, size in sizes.items() for _ in range(size)]
    return [TokenRow([1, 2, n], [1, 2], str(n), 3, source=name) for n, name in enumerate(names)]


def drawn(rows, weights, epochs, seed=0):
    return [n for step in plan_steps(rows, epochs=epochs, seed=seed, examples=7, weights=weights) for n in step]


# The mixture


def parts_by_hand(sizes, weights):
    """Hamilton's method in exact fractions."""
    total, whole = sum(sizes.values()), sum(map(Fraction, weights.values()))
    exact = {name: total * Fraction(weight) / whole for name, weight in weights.items()}
    parts = {name: math.floor(value) for name, value in exact.items()}
    rest = sorted(exact, key=lambda name: (parts[name] - exact[name], list(exact).index(name)))[: total - sum(parts.values())]
    return {name: part + (name in rest) for name, part in parts.items()}


def check_mixture(stream, rows, sizes, weights, epochs):
    """Every epoch has each source's part; each source is gone through in passes that have each of its rows once."""
    total, parts = len(rows), parts_by_hand(sizes, weights)
    assert len(stream) == epochs * total
    for epoch in range(epochs):
        counts = Counter(rows[n].source for n in stream[epoch * total : (epoch + 1) * total])
        assert counts == Counter({name: part for name, part in parts.items() if part})
    for name, size in sizes.items():
        own = [n for n in stream if rows[n].source == name]
        passes = [own[start : start + size] for start in range(0, len(own), size)]
        assert all(len({*one}) == len(one) for one in passes)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_an_epoch_has_each_sources_share_and_no_example_twice_before_all_others(data):
    names = ["a", "b", "c", "d"][: data.draw(st.integers(1, 4))]
    sizes = {name: data.draw(st.integers(1, 40)) for name in names}
    weights = {name: data.draw(st.integers(1, 64)) / 8 for name in names}
    rows, epochs = numbered(sizes), data.draw(st.integers(1, 4))
    seed = data.draw(st.integers(0, 5))
    stream = drawn(rows, weights, epochs, seed)
    check_mixture(stream, rows, sizes, weights, epochs)
    assert stream == drawn(rows, weights, epochs, seed)
    assert drawn(rows, weights, 1, seed) == stream[: len(rows)]  # a longer run begins as a shorter one: it can be resumed


def test_other_ways_to_mix_would_be_noticed(monkeypatch):
    sizes, weights = {"a": 10, "b": 30}, {"a": 1.0, "b": 1.0}
    rows = numbered(sizes)
    check_mixture(drawn(rows, weights, 3), rows, sizes, weights, 3)
    with pytest.raises(AssertionError):
        check_mixture(drawn(rows, {}, 3), rows, sizes, weights, 3)
    monkeypatch.setattr(order, "shuffled", lambda count, seed, epoch: [(7 * n) % count // 2 for n in range(count)])
    with pytest.raises(AssertionError):
        check_mixture(drawn(rows, weights, 3), rows, sizes, weights, 3)


def test_sources_of_one_size_are_not_in_the_same_order():
    """Translations of each other, say, would come side by side."""
    rows = numbered({"a": 30, "b": 30})
    stream = drawn(rows, {"a": 1.0, "b": 1.0}, 1)
    ours, theirs = ([n % 30 for n in stream if rows[n].source == name] for name in ("a", "b"))
    assert sorted(ours) == sorted(theirs)
    assert ours != theirs


def test_the_order_is_another_with_another_seed_and_in_another_epoch():
    rows, weights = numbered({"a": 20, "b": 20}), {"a": 3.0, "b": 1.0}
    first, second = drawn(rows, weights, 2)[:40], drawn(rows, weights, 2)[40:]
    assert first != second != drawn(rows, weights, 1, seed=1)
    names = ["".join(rows[n].source for n in epoch) for epoch in (first, second)]
    assert names[0] != names[1] != "a" * 30 + "b" * 10


def test_pairs_stay_together_in_a_mixture():
    rows = []
    for n in range(12):
        source = "a" if n < 3 else "b"
        rows += [TokenRow([1, n], [1], f"{n}", 2, side, source=source) for side in ("chosen", "rejected")]
    plan = plan_steps(rows, epochs=2, seed=0, examples=4, weights={"a": 1.0, "b": 1.0})
    assert all(step[n + 1] == step[n] + 1 for step in plan for n in range(0, len(step), 2))
    assert Counter(rows[n].source for step in plan for n in step) == {"a": 24, "b": 24}


def files(folder, **counts):
    """A file of each name with so many examples; their paths by name."""
    for name, count in counts.items():
        write_rows(folder / f"{name}.jsonl", [{"prompt": f"{name} {n}?", "completion": f"{name} is {n}"} for n in range(count)])
    return {name: str(folder / f"{name}.jsonl") for name in counts}


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def loaded(train, seed=0, base=BASE, kind="answers", **settings):
    return load_data(DataConfig(**{"eval": 0, "train": train, **settings}), base, None, seed, kind)


def message_of(train, **settings):
    with pytest.raises(DataError) as caught:
        loaded(train, **settings)
    return str(caught.value)


def test_rows_know_their_source_and_shares_are_said(tmp_path):
    named = {
        name: {"path": path, "weight": {"big": 1.0, "small": 3.0}[name]}
        for name, path in files(tmp_path, big=60, small=20).items()
    }
    data = loaded(named, eval=8)
    assert Counter(row.source for row in data.train) == {"big": 54, "small": 18}
    assert Counter(row.source for row in data.eval) == {"big": 6, "small": 2}
    assert {name: str(share) for name, share in data.shares.items()} == {
        "big": "25% of each epoch: 18 examples, each of its 54 0.333 times; 6 for validation",
        "small": "75% of each epoch: 54 examples, each of its 18 3 times; 2 for validation",
    }
    assert [report.name for report in data.reports] == [f"{name} ({source['path']})" for name, source in named.items()]
    plain = {name: source["path"] for name, source in named.items()}
    assert str(loaded(plain, eval=8).shares["big"]) == "75% of each epoch: 54 examples; 6 for validation"
    assert loaded([*plain.values()], eval=8).shares == {}


def test_without_weights_every_example_is_trained_on_once_an_epoch(tmp_path):
    named = files(tmp_path, a=5, b=17)
    rows = loaded(named).train
    assert Counter(drawn(rows, {}, 2)) == dict.fromkeys(range(22), 2)
    assert [row.ids for row in rows] == [row.ids for row in loaded([*named.values()]).train]


def test_a_weight_that_would_train_on_nothing_is_refused(tmp_path):
    named = {name: {"path": path, "weight": {"a": 1.0, "b": 1e-4}[name]} for name, path in files(tmp_path, a=30, b=20).items()}
    assert message_of(named) == (
        "data.train.b.weight: its share of an epoch of 50 examples is less than one. Raise it, or leave the source out."
    )


def test_weights_and_names_are_part_of_what_a_resumed_run_must_have_kept(tmp_path):
    paths = files(tmp_path, a=9, b=9)
    digests = [
        loaded({"a": {"path": paths["a"], "weight": weight}, other: {"path": paths["b"], "weight": 1.0}}).digest
        for weight, other in ((1.0, "b"), (1.0, "b"), (2.0, "b"), (1.0, "c"))
    ]
    assert digests[0] == digests[1]
    assert len({*digests}) == 3


# A limit


def test_a_limit_takes_a_sample_that_the_seed_decides_and_a_larger_one_holds_it(tmp_path):
    path = files(tmp_path, a=100)["a"]

    def places(limit, seed=0, path=path):
        rows = loaded({"a": {"path": path, "limit": limit}}, seed).train
        return [int(row.where.rpartition(":")[2]) for row in rows]

    assert places(10) == places(10) == sorted(places(10))
    assert len(places(10)) == 10 != places(10, seed=1)
    assert {*places(10)} < {*places(30)}
    assert max(places(10)) > 50  # not the first ones
    assert places(1000) == [*range(1, 101)]
    datasets.Dataset.from_json(path, cache_dir=str(tmp_path / "cache")).save_to_disk(tmp_path / "saved")
    assert places(10, path=str(tmp_path / "saved")) == places(10)  # which takes it without reading the others


def test_what_a_limit_leaves_out_is_not_tokenized(tmp_path, monkeypatch):
    encoded = []
    real = type(BASE).encode
    monkeypatch.setattr(type(BASE), "encode", lambda self, texts, **more: encoded.extend(texts) or real(self, texts, **more))
    loaded({"a": {"path": files(tmp_path, a=50)["a"], "limit": 3}})
    assert len({text for text in encoded if " is " in text}) == 3


# Held out


@pytest.mark.parametrize(
    ("wanted", "sizes", "expected"),
    [
        (0.1, {"a": 100, "b": 31, "c": 3}, {"a": 10, "b": 3, "c": 1}),
        (10, {"a": 60, "b": 30, "c": 10}, {"a": 6, "b": 3, "c": 1}),
        (20, {"a": 990, "b": 10}, {"a": 19, "b": 1}),  # at least one of each
        (1, {"a": 60, "b": 30}, {"a": 1}),
        (0, {"a": 60, "b": 30}, {}),
    ],
)
def test_each_source_gives_its_part_to_the_validation_set(wanted, sizes, expected):
    rows = numbered(sizes)
    chosen = places_held_out(wanted, rows, seed=3)
    assert Counter(row.source for row in rows if row.where in chosen) == expected


def test_a_source_that_would_be_left_with_nothing_is_named(tmp_path):
    assert message_of(files(tmp_path, a=30, b=1), eval=0.1) == (
        "data.eval: 0.1 would hold out 1 of 1 usable examples of b and leave none to train on. "
        "Give a smaller fraction or count, a file of its own, or 0."
    )


def test_one_file_read_in_two_ways_is_held_out_in_both(tmp_path):
    path = files(tmp_path, a=20)["a"]
    swapped = {"columns": {"prompt": "completion", "completion": "prompt"}}
    data = loaded({"there": path, "back": {"path": path, **swapped}}, eval=0.2)
    assert {row.where for row in data.train}.isdisjoint(row.where for row in data.eval)
    with pytest.raises(DataError, match=f"there and again both read {path}, so its examples would be there twice"):
        check_first_examples(DataConfig(train={"there": path, "again": {"path": path, "limit": 3}}))
    check_first_examples(DataConfig(train={"there": path, "back": {"path": path, **swapped}}))


def test_validation_sources_have_names_and_are_found_again(tmp_path):
    paths = files(tmp_path, a=10, b=10, c=4, d=4)
    config = DataConfig(
        train={"a": paths["a"], "b": {"path": paths["b"], "limit": 5}},
        eval={"c": paths["c"], "d": {"path": paths["d"], "limit": 2}},
    )
    data = load_data(config, BASE, None, seed=5)
    assert Counter(row.source for row in data.eval) == {"c": 4, "d": 2}
    again = held_out_examples(config, json.loads(json.dumps(data.plain())))
    assert sorted((e.source, e.where) for e in again) == sorted((row.source, row.where) for row in data.eval)
    fraction = DataConfig(train={"a": paths["a"], "b": {"path": paths["b"], "limit": 5}}, eval=0.4)
    data = load_data(fraction, BASE, None, seed=5)
    again = held_out_examples(fraction, json.loads(json.dumps(data.plain())))
    assert sorted((e.source, e.where) for e in again) == sorted((row.source, row.where) for row in data.eval)


# Duplicates


def test_duplicates_are_removed_across_sources_and_counted(tmp_path):
    paths = files(tmp_path, a=6, b=4)
    write_rows(
        tmp_path / "b.jsonl",
        rows_of(paths["a"])[:3] + [{"prompt": "new", "completion": "x"}] * 2,
    )
    data = loaded(paths, duplicates="remove")
    assert Counter(row.source for row in data.train) == {"a": 6, "b": 1}
    assert data.reports[1].duplicates == [f"{paths['b']}:{n}" for n in (1, 2, 3, 5)]
    assert str(data.reports[1]).endswith(": 5 examples: 1 used, 0 rejected, 4 removed as duplicates")
    assert len(loaded(paths).train) == 11
    assert message_of(
        {"a": paths["a"], "c": files(tmp_path, c=1)["c"]} | copy_of(paths["a"], tmp_path), duplicates="remove"
    ).startswith("data: no example of d (")


def copy_of(path, folder):
    write_rows(folder / "d.jsonl", rows_of(path))
    return {"d": str(folder / "d.jsonl")}


def test_the_same_prompt_with_another_answer_is_no_duplicate_nor_are_other_targets(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
    partly = [turns[0], {**turns[1], "weight": 0}, *turns[2:]]
    write_rows(tmp_path / "x.jsonl", [{"messages": turns}, {"messages": partly}, {"messages": turns}])
    data = loaded([str(tmp_path / "x.jsonl")], duplicates="remove")
    assert [row.where.rpartition(":")[2] for row in data.train] == ["1", "2"]


def test_a_training_example_that_is_a_validation_example_is_removed_from_training(tmp_path):
    paths = files(tmp_path, a=6, held=2)
    write_rows(tmp_path / "held.jsonl", rows_of(paths["a"])[:2])
    data = loaded([paths["a"]], eval=paths["held"], duplicates="remove")
    assert (len(data.train), len(data.eval), len(data.reports[0].held_out_too)) == (4, 2, 2)
    assert "2 removed because they are validation examples" in str(data.reports[0])
    twice = loaded([paths["a"], paths["a"]], eval=2, duplicates="remove")
    assert (len(twice.train), len(twice.eval)) == (4, 2)
    config = DataConfig(train=(paths["a"], paths["a"]), eval=2, duplicates="remove")
    assert len(held_out_examples(config, json.loads(json.dumps(twice.plain())))) == 2


# Evaluation by source


@pytest.mark.parametrize("kind", ["answers", "pairs"])
def test_the_loss_of_each_source_is_that_of_its_rows_alone(tmp_path, kind):
    base = tiny_base()
    paths = files(tmp_path, a=7, b=3, c=1)
    if kind == "pairs":
        for name, path in paths.items():
            write_rows(
                tmp_path / f"{name}.jsonl",
                [{"prompt": row["prompt"], "chosen": name, "rejected": "no"} for row in rows_of(path)],
            )
    objective = DPO() if kind == "pairs" else None
    rows = loaded(paths, base=base, kind=kind).train
    whole = score_loss(base, rows, 64, objective)
    found = whole.by_source["sources"]
    assert list(found) == ["a", "b", "c"]
    for name, of_source in found.items():
        alone = score_loss(base, [row for row in rows if row.source == name], 64, objective)
        assert of_source["loss"] == pytest.approx(alone.loss, rel=1e-4)
        assert of_source["rows"] == alone.rows
        if name == "c":  # one row has no interval
            assert (of_source["low"], of_source["high"]) == (None, None)
        else:
            assert of_source["low"] <= of_source["loss"] <= of_source["high"]
    if kind == "answers":
        losses = [of_source["loss"] for of_source in found.values()]
        assert len({*losses}) == 3  # so that confused sources would be noticed
        tokens = [sum(len(row.target_indices) for row in rows if row.source == name) for name in found]
        assert whole.loss == pytest.approx(sum(map(lambda a, b: a * b, losses, tokens)) / sum(tokens), rel=1e-5)
    assert score_loss(base, loaded([*paths.values()], base=base, kind=kind).train, 64, objective).by_source == {}


def test_a_run_on_several_sources_says_each_ones_loss_and_eval_repeats_it(here, trimtab):
    write_rows(here / "odd.jsonl", [{"prompt": f"Is {n} odd?", "completion": "yes" if n % 2 else "no"} for n in range(12)])
    recipe = {"a": {"path": "rows.jsonl", "weight": 1}, "odd": {"path": "odd.jsonl", "weight": 2, "limit": 10}}
    done = trimtab("train", "r.yaml", f"data.train={json.dumps(recipe)}", "data.eval=0.2", "output=new", "train.epochs=1")
    assert done.code == 0, done.err
    assert "a: 34% of each epoch: 11 examples, each of its 24 0.458 times; 6 for validation" in plainly(done.out)
    assert "odd: loss " in plainly(done.out)
    lines = [json.loads(line) for line in (here / "new" / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["kind"] == "eval"][-1]
    assert {name: part["rows"] for name, part in last["sources"].items()} == {"a": 6, "odd": 2}
    record = json.loads((here / "new" / "run.json").read_text())
    assert record["last"]["sources"] == last["sources"]
    assert record["sources"]["odd"]["per_epoch"] == 21
    best = next(line for line in lines if line["kind"] == "eval" and line["step"] == record["best"]["step"])
    evaluated = json.loads(trimtab("eval", "new", "--json").out)
    for name, part in evaluated["sources"].items():
        assert part["loss"] == pytest.approx(best["sources"][name]["loss"], rel=1e-4)
    assert "odd, 2" in plainly(trimtab("eval", "new").out)
    checked = plainly(trimtab("check", "new/recipe.yaml", "--html", "page.html").out)
    assert "mixture a: 34% of each epoch" in checked
    assert "a: 34% of each epoch" in (here / "page.html").read_text()


def test_a_small_source_that_is_seen_often_is_noted(here, trimtab):
    write_rows(here / "few.jsonl", [{"prompt": f"So {n}?", "completion": "no"} for n in range(2)])
    train = {"a": {"path": "rows.jsonl", "weight": 1}, "few": {"path": "few.jsonl", "weight": 2}}
    out = trimtab("check", "r.yaml", f"data.train={json.dumps(train)}", "data.eval=0").out
    assert "each epoch goes through few 10 times, so its examples may be memorized" in plainly(out)


# Objects


def test_objects_in_memory_are_read_as_a_file_is(tmp_path):
    base = BASE
    path = tmp_path / "rows.jsonl"
    write_rows(path, ROWS)
    expected = package.rows(str(path), base)
    stream = datasets.Dataset.from_list(ROWS).to_iterable_dataset()
    for source, name in ((path, None), (ROWS, "rows"), (datasets.Dataset.from_list(ROWS), "dataset"), (stream, "dataset")):
        made = package.rows(source, base)
        assert [(row.ids, row.target_indices) for row in made] == [(row.ids, row.target_indices) for row in expected]
        assert name is None or [row.where for row in made] == [f"{name}[{n}]" for n in range(30)]
    chosen = [row.where.strip("rows[]") for row in package.rows(ROWS, base, limit=5)]
    assert [row.where.strip("dats[]e") for row in package.rows(datasets.Dataset.from_list(ROWS), base, limit=5)] == chosen
    endless = datasets.IterableDataset.from_generator(lambda: itertools.cycle(ROWS))
    assert [row.where for row in package.rows(endless, base, limit=3)] == ["dataset[0]", "dataset[1]", "dataset[2]"]
    assert len(package.rows([*ROWS, *ROWS], base, duplicates="remove")) == 30
    assert len(package.rows(path, base, limit=4, seed=3)) == 4


def test_objects_that_are_no_rows_are_refused_with_what_to_do():
    data = datasets.Dataset.from_list(ROWS)
    for source, own, kind, words in (
        (
            datasets.DatasetDict({"train": data, "test": data}),
            {},
            RecipeError,
            r"DatasetDict with train, test is a mapping: choose one of",
        ),
        ({"prompt": ["a"]}, {}, RecipeError, "dict with prompt is a mapping"),
        (3, {}, RecipeError, "expected a path, a list of dicts or a dataset, got int"),
        (ROWS, {"split": "train"}, RecipeError, "split: objects in memory have no such parts"),
        (ROWS, {"limit": 0}, RecipeError, "limit: expected a number of at least 1"),
        (["a"], {}, DataError, r"rows\[0\]: an example is an object with named columns, not a string"),
        ([], {}, DataError, "rows holds no examples"),
        (data.rename_column("prompt", "q"), {}, DataError, r"dataset\[0\] and 29 more: column 'prompt' is missing"),
    ):
        with pytest.raises(kind, match=words):
            package.rows(source, BASE, **own)
    with pytest.raises(RecipeError, match="a recipe names files, so that it repeats a run"):
        Recipe.parse({"data": {"train": data}})


# Parts of datasets


def test_subsets_and_splits_of_a_local_copy_of_a_dataset(tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    files(folder, one=3, one_test=2, two=4)
    (folder / "README.md").write_text(dataset_card("one", "two"))
    for parts, count in (
        ({"subset": "one"}, 3),
        ({"subset": "one", "split": "test"}, 2),
        ({"subset": "two"}, 4),
        ({"subset": "two", "split": "train[:2]"}, 2),
    ):
        assert len(loaded({"a": {"path": str(folder), **parts}}).train) == count
    assert "Available: ['one', 'two']" in message_of({"a": {"path": str(folder), "subset": "three"}})
    assert "['train', 'test']" in message_of({"a": {"path": str(folder), "subset": "one", "split": "dev"}})
    assert "['one', 'two']" in message_of({"a": {"path": str(folder), "split": "test"}})
    two = loaded({"a": {"path": str(folder), "subset": "one"}, "b": {"path": str(folder), "subset": "two"}}, eval=2)
    assert Counter(row.source for row in two.train + two.eval) == {"a": 3, "b": 4}


def test_splits_of_a_saved_dataset_are_chosen_by_name(tmp_path):
    parts = {name: datasets.Dataset.from_list(ROWS[:count]) for name, count in (("train", 4), ("test", 3))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    saved = str(tmp_path / "saved")
    assert [len(loaded({"a": {"path": saved, **split}}).train) for split in ({}, {"split": "test"})] == [4, 3]
    assert message_of({"a": {"path": saved, "split": "dev"}}) == (
        f"data: {saved} has no split dev, but train, test; give one, for example {saved}/train."
    )
    assert message_of({"a": {"path": saved, "subset": "x"}}).endswith("which has no subset: leave it out.")
    assert message_of({"a": {"path": f"{saved}/test", "split": "test"}}).endswith("has a single split: leave split (test) out.")
    path = files(tmp_path, rows=3)["rows"]
    assert message_of({"a": {"path": path, "split": "test"}}).endswith(f"and {path} is a file: leave split out.")
