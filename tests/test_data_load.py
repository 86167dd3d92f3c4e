"""From files to steps: every row accounted for, held out or learned, and learned as often as the epochs say."""

import hashlib
import json
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from templates import FAMILIES

from trimtab.core.errors import DataError, RecipeError
from trimtab.data import DataConfig, held_out_examples, load_data, load_examples, pack_all, pack_flat, plan_steps
from trimtab.data.example import TokenRow
from trimtab.data.order import shuffled, split

BASE = FAMILIES["chatml"].make


def rows_file(folder, count, name="rows.jsonl", change=None):
    rows = [{"prompt": f"question {n}", "completion": f"answer {n}"} for n in range(count)]
    for number, row in (change or {}).items():
        rows[number] = row
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def loaded(source, seed=0, context=None, **settings):
    return load_data(DataConfig(train=source, **settings), BASE(), context, seed)


def message_of(source, kind=DataError, **settings):
    with pytest.raises(kind) as caught:
        loaded(source, **settings)
    return str(caught.value)


def wheres(rows):
    return [row.where for row in rows]


# Held out


@pytest.mark.parametrize(
    ("held", "count"), [(0, 0), (0.0, 0), (0.05, 2), (0.25, 10), (0.001, 1), (1, 1), (1.0, 1), (7, 7), (39, 39), (0.97, 39)]
)
def test_rows_are_held_out_by_fraction_or_count(tmp_path, held, count):
    source = rows_file(tmp_path, 40)
    data = loaded(source, eval=held)
    assert len(data.eval) == count
    assert sorted(wheres(data.train + data.eval)) == sorted(f"{source}:{n}" for n in range(1, 41))
    assert wheres(data.train) == sorted(wheres(data.train), key=lambda where: int(where.rpartition(":")[2]))


def test_which_rows_are_held_out_is_decided_by_the_seed(tmp_path):
    source = rows_file(tmp_path, 40)
    chosen = [wheres(loaded(source, seed, eval=8).eval) for seed in (0, 0, 1, 2)]
    assert chosen[0] == chosen[1]
    assert len({tuple(one) for one in chosen}) == 3
    # The same on every machine.
    assert [where.rpartition(":")[2] for where in chosen[0]] == ["10", "11", "14", "15", "16", "23", "24", "38"]


@pytest.mark.parametrize(("count", "held"), [(n, k) for n in (1, 2, 7, 33) for k in range(n + 1)])
def test_a_split_takes_each_row_once(count, held):
    for seed in range(3):
        train, evaluation = split(count, held, seed)
        assert len(evaluation) == held
        assert sorted(train + evaluation) == list(range(count))
        assert train == sorted(train)
        assert evaluation == sorted(evaluation)
        assert split(count, held, seed) == (train, evaluation)


def test_rows_that_share_a_line_are_held_out_one_by_one(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"prompt": f"question {n}", "completion": f"answer {n}"} for n in range(10)]))
    data = loaded(str(path), eval=3)
    assert (len(data.train), len(data.eval)) == (7, 3)


def test_turns_of_one_row_are_never_parted(tmp_path):
    thought = "<think>\nhm\n</think>\n\nyes"
    turns = [("user", "a"), ("assistant", thought), ("user", "b"), ("assistant", thought)]
    messages = [{"role": role, "content": text} for role, text in turns]
    source = rows_file(tmp_path, 20, change={n: {"messages": messages} for n in range(20)})
    data = load_data(DataConfig(train=source, eval=5), FAMILIES["qwen3"].make(), None, seed=0)
    assert set(Counter(wheres(data.train + data.eval)).values()) == {2}
    assert (len(data.train), len(data.eval)) == (30, 10)
    assert set(wheres(data.train)).isdisjoint(wheres(data.eval))
    assert data.reports[0].used == 20


def test_a_row_that_is_given_twice_is_not_both_learned_and_held_out(tmp_path):
    source = rows_file(tmp_path, 10)
    data = loaded((source, source), eval=3)
    assert (len(data.train), len(data.eval)) == (14, 6)
    assert set(wheres(data.train)).isdisjoint(wheres(data.eval))


def test_held_out_rows_can_be_a_file_of_their_own(tmp_path):
    source, other = rows_file(tmp_path, 4), rows_file(tmp_path, 3, "other.jsonl")
    data = loaded(source, eval=other)
    assert wheres(data.train) == [f"{source}:{n}" for n in range(1, 5)]
    assert wheres(data.eval) == [f"{other}:{n}" for n in range(1, 4)]
    assert [str(report) for report in data.reports] == [
        f"{source}: 4 examples: 4 used, 0 rejected",
        f"{other}: 3 examples: 3 used, 0 rejected",
    ]


@pytest.mark.parametrize(("rows", "held", "count"), [(10, 10, 10), (10, 11, 11), (10, 0.96, 10), (1, 0.05, 1), (1, 1, 1)])
def test_holding_out_every_row_is_refused(tmp_path, rows, held, count):
    assert message_of(rows_file(tmp_path, rows), eval=held) == (
        f"data.eval: {held:g} would hold out {count} of {rows} usable examples and leave none to train on. "
        "Give a smaller fraction or count, a file of its own, or 0."
    )


def test_a_whole_number_may_be_written_with_a_point():
    assert DataConfig(train=("rows.jsonl",), eval=3.0) == DataConfig(train=("rows.jsonl",), eval=3)


@pytest.mark.parametrize("held", [-1, -0.5, 1.5, True, None])
def test_an_impossible_amount_to_hold_out_is_a_recipe_error(held):
    with pytest.raises(RecipeError) as caught:
        DataConfig(train=("rows.jsonl",), eval=held)
    assert str(caught.value).startswith("eval: expected ")
    assert str(caught.value).endswith(f", got {json.dumps(held)}.")


# Accounts


def test_rows_that_cannot_be_used_stop_the_run_with_a_list_of_the_first(tmp_path):
    roles = {n: {"messages": [{"role": f"r{n}", "content": "a"}]} for n in range(1, 8)}
    source = rows_file(tmp_path, 20, change={**roles, **{n: {"prompt": "a", "completion": ""} for n in (0, 9, 12)}})
    words = ", not system, user, assistant or tool, nor a known synonym of one of them"
    alone = "\n".join(f"  {source}:{n + 1}: messages[0].role is 'r{n}'{words}" for n in range(1, 5))
    assert message_of(source) == (
        f"data: examples that can't be used:\n  {source}:1 and 2 more: completion is empty\n{alone}\n  … and 3 more\n"
        f"{source}: 20 examples: 10 used, 10 rejected\n"
        "Fix them, or leave them out with data.bad_rows=skip."
    )


def test_rows_that_cannot_be_used_are_left_out_when_told_to_and_remembered(tmp_path):
    source = rows_file(tmp_path, 20, change={4: {"prompt": "a", "label": 1}, 6: {"prompt": "<|im_end|>", "completion": "b"}})
    data = loaded(source, bad_rows="skip", eval=0)
    assert len(data.train) == 18
    assert data.plain()["sources"] == [
        {
            "name": "",
            "source": source,
            "rows": 20,
            "used": 18,
            "refused": [
                {
                    "where": f"{source}:5",
                    "reason": "column 'completion' is missing beside prompt; the example has prompt, label",
                },
                {"where": f"{source}:7", "reason": "messages[0] (user) holds the model's control token <|im_end|> as text"},
            ],
            "dropped": [],
            "duplicates": [],
            "held_out_too": [],
            "split": 0,
            "blocks": 0,
            "columns_not_read": [],
            "nulls_left_out": 0,
        }
    ]


def test_what_is_wrong_with_the_rows_is_said_before_what_is_wrong_with_the_split(tmp_path):
    source = rows_file(tmp_path, 2, change={1: {"prompt": "a"}})
    assert message_of(source).startswith("data: examples that can't be used:\n")


def test_rows_none_of_which_can_be_used_are_refused_even_if_bad_rows_may_be_skipped(tmp_path):
    source, good = rows_file(tmp_path, 1, change={0: {"text": ""}}), rows_file(tmp_path, 3, "good.jsonl")
    expected = (
        f"data: no example of {source} can be used:\n  {source}:1: text is empty\n{source}: 1 examples: 0 used, 1 rejected"
    )
    assert message_of(source, bad_rows="skip") == expected
    assert message_of(good, eval=source, bad_rows="skip") == expected


def test_rows_that_are_too_long_are_refused_with_the_way_out(tmp_path):
    source = rows_file(tmp_path, 3, change={1: {"prompt": "a", "completion": "hello " * 100}})
    longest = max(len(row.ids) for row in loaded(source, eval=0).train)
    by_context = {"context": 60}, {"max_length": 100, "context": 60}
    for limits in ({"max_length": 60}, {"max_length": 60, "context": 100}, *by_context):
        called = "the context length 60" if limits in by_context else "max_length 60"
        assert message_of(source, **limits) == (
            f"data: examples that can't be used:\n  {source}:2: has {longest} tokens up to the end of its last answer, more than "
            f"{called}\n{source}: 3 examples: 2 used, 1 rejected\n"
            "Fix them, or leave them out with data.bad_rows=skip (or truncate or drop long ones with data.overlong)."
        )
    with pytest.raises(DataError, match="more than the 60 tokens that 20 virtual ones leave of the context"):
        load_data(DataConfig(train=source, eval=0), BASE(), 80, 0, positions=20)
    cut = loaded(source, eval=0, max_length=60, overlong="truncate")
    assert [len(row.ids) for row in cut.train][1] == 60
    assert cut.train[1].full_length == longest + 1  # and the newline behind its end


def test_several_sources_are_one_account(tmp_path):
    sources = rows_file(tmp_path, 2), rows_file(tmp_path, 3, "other.jsonl", {1: {"text": "a", "id": 1}})
    data = loaded(sources, eval=0)
    (report,) = data.reports
    assert str(report) == f"{sources[0]}, {sources[1]}: 5 examples: 5 used, 0 rejected"
    assert report.ignored_columns == {"id"}


# Again


def test_the_digest_changes_with_any_token_label_or_split(tmp_path):
    def digest(source, seed=0, **settings):
        return loaded(source, seed, **{"eval": 2} | settings).digest

    source = rows_file(tmp_path, 30)
    copy = rows_file(tmp_path, 30, "copy.jsonl")
    other = rows_file(tmp_path, 30, "other.jsonl", {3: {"prompt": "question 3", "completion": "answer 3."}})
    exchanged = {3: {"prompt": "question 4", "completion": "answer 4"}, 4: {"prompt": "question 3", "completion": "answer 3"}}
    moved = rows_file(tmp_path, 30, "moved.jsonl", exchanged)
    digests = [digest(source), digest(other), digest(moved), digest(source, seed=1), digest(source, eval=3)]
    assert len(set(digests)) == len(digests)
    assert digest(copy) == digest(source) == digests[0]
    # The same tokens with other labels.
    messages = [{"role": "user", "content": "question 3"}, {"role": "assistant", "content": "answer 3"}]
    full = rows_file(tmp_path, 30, "full.jsonl", {3: {"messages": messages * 2}})
    less = rows_file(tmp_path, 30, "less.jsonl", {3: {"messages": [messages[0], {**messages[1], "weight": 0}, *messages]}})
    assert digest(full) != digest(less)
    # The same rows, some of them held out instead of learned.
    assert digest((source, copy), eval=0) != digest(source, eval=copy)


def test_held_out_rows_are_found_again(tmp_path):
    source = rows_file(tmp_path, 30)
    config = DataConfig(train=(source,), eval=5)
    data = load_data(config, BASE(), None, seed=3)
    remembered = json.loads(json.dumps(data.plain()))
    assert remembered["files"] == {source: hashlib.sha256((tmp_path / "rows.jsonl").read_bytes()).hexdigest()}
    assert sorted(wheres(held_out_examples(config, remembered))) == sorted(wheres(data.eval))
    (tmp_path / "rows.jsonl").write_text((tmp_path / "rows.jsonl").read_text().replace("answer 29", "answer 30"))
    with pytest.raises(DataError) as caught:
        held_out_examples(config, remembered)
    assert str(caught.value) == (
        f"data: {source} has changed since the run or is gone, so its validation examples are not known. Give examples with --data."
    )


def test_a_file_in_the_home_folder_is_remembered_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    rows_file(tmp_path, 10)
    config = DataConfig(train=("~/rows.jsonl",), eval=2)
    remembered = load_data(config, BASE(), None, seed=0).plain()
    assert list(remembered["files"]) == [str(tmp_path / "rows.jsonl")]
    assert len(held_out_examples(config, remembered)) == 2
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(DataError, match="has changed since the run or is gone"):
        held_out_examples(config, remembered)


def test_held_out_rows_of_a_file_of_their_own_are_found_again(tmp_path):
    source, other = rows_file(tmp_path, 4), rows_file(tmp_path, 3, "other.jsonl", {1: {"text": ""}})
    config = DataConfig(train=(source,), eval=other, bad_rows="skip")
    remembered = load_data(config, BASE(), None, seed=0).plain()
    assert wheres(held_out_examples(config, remembered)) == [f"{other}:1", f"{other}:3"]


def test_examples_are_read_with_the_columns_of_the_recipe(tmp_path):
    (tmp_path / "rows.csv").write_text("question,answer\na,b\n")
    examples, report = load_examples(str(tmp_path / "rows.csv"), {"prompt": "question", "completion": "answer"})
    assert [message["content"] for message in examples[0].messages] == ["a", "b"]
    assert report.rejected == []


# Steps


def sequence(length, number=0):
    return TokenRow(list(range(length)), [length - 1], f"data:{number}", length)


@pytest.mark.parametrize("count", range(1, 34))
def test_every_row_is_learned_once_an_epoch(count):
    rows = [sequence(3, n) for n in range(count)]
    for per_step in range(1, 9):
        for epochs in (1, 2, 3):
            plan = plan_steps(rows, epochs=epochs, seed=5, examples=per_step)
            assert Counter(n for step in plan for n in step) == dict.fromkeys(range(count), epochs)
            assert [len(step) for step in plan[:-1]] == [per_step] * (len(plan) - 1)
            assert 1 <= len(plan[-1]) <= per_step
            stream = [n for step in plan for n in step]
            for epoch in range(epochs):  # each epoch is an order of all rows, the epoch's own
                assert stream[epoch * count : (epoch + 1) * count] == shuffled(count, 5, epoch)


@pytest.mark.parametrize("budget", [1, 7, 20, 64, 1000])
def test_steps_of_tokens_hold_every_row_once_an_epoch(budget):
    for count in (1, 2, 13, 33):
        rows = [sequence(2 + (n * 7) % 23, n) for n in range(count)]
        plan = plan_steps(rows, epochs=2, seed=1, tokens=budget)
        assert Counter(n for step in plan for n in step) == dict.fromkeys(range(count), 2)
        sizes = [sum(len(rows[n].ids) for n in step) for step in plan]
        assert all(size <= budget or len(step) == 1 for size, step in zip(sizes, plan, strict=True))
        for step, after in pairwise(plan):  # no step could have taken the next row
            assert sum(len(rows[n].ids) for n in [*step, after[0]]) > budget


@pytest.mark.parametrize(
    ("count", "epochs", "total"), [(10, 1.1, 11), (10, 0.5, 5), (3, 0.5, 2), (30, 0.1, 3), (100, 0.07, 7), (7, 1e-9, 1)]
)
def test_parts_of_epochs_are_rounded_up_to_whole_rows(count, epochs, total):
    plan = plan_steps([sequence(3, n) for n in range(count)], epochs=epochs, seed=0, examples=4)
    learned = Counter(n for step in plan for n in step)
    assert learned.total() == total
    assert max(learned.values()) - min(learned[n] for n in range(count)) <= 1


def test_the_order_is_decided_by_seed_and_epoch_alone():
    assert shuffled(8, 0, 0) == shuffled(8, 0, 0)
    assert len({tuple(shuffled(20, seed, epoch)) for seed in range(5) for epoch in range(5)}) == 25
    assert shuffled(8, 0, 0) == [0, 2, 1, 4, 6, 7, 3, 5]  # the same on every machine
    rows = [sequence(3, n) for n in range(8)]
    assert plan_steps(rows, epochs=1, seed=4, examples=2) == plan_steps(rows, epochs=3, seed=4, examples=2)[:4]


# Packs


@settings(max_examples=100, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(2, 40), max_size=40), limit=st.integers(1, 60))
def test_packs_hold_every_row_once_and_no_more_than_their_limit(lengths, limit):
    rows = [TokenRow([n] * length, [length - 1], f"data:{n}", length) for n, length in enumerate(lengths)]  # none alike
    packs = pack_all(rows, limit)
    assert sorted(wheres(row for pack in packs for row in pack.rows)) == sorted(wheres(rows))
    for pack in packs:
        assert len(pack.ids) <= limit or len(pack.rows) == 1
        assert len(pack.ids) == sum(len(row.ids) - 1 for row in pack.rows)
        assert pack.targets == sum(len(row.target_indices) for row in pack.rows)
    if lengths and max(lengths) <= limit:
        assert sum(2 * len(pack.ids) <= limit for pack in packs) <= 1  # two half empty packs would have been one
    again = pack_all(rows, limit)
    assert [wheres(pack.rows) for pack in again] == [wheres(pack.rows) for pack in packs]


@pytest.mark.parametrize(("count", "sizes"), [(10, [50, 50]), (13, [50, 50, 30]), (6, [60]), (12, [60, 60])])
def test_the_largest_of_few_packs_is_no_larger_than_it_has_to_be(count, sizes):
    rows = [TokenRow([n] * 11, [10], f"data:{n}", 11) for n in range(count)]
    assert sorted((len(pack.ids) for pack in pack_all(rows, 60)), reverse=True) == sizes


def test_even_packs_are_no_more_than_the_fewest():
    rows = [TokenRow([n] * length, [length - 1], f"data:{n}", length) for n, length in enumerate([41, 31, 31, 21, 21])]
    sizes = {limit: sorted((len(pack.ids) for pack in pack_all(rows, limit)), reverse=True) for limit in (60, 80, 200)}
    assert sizes == {60: [50, 50, 40], 80: [70, 70], 200: [140]}


def test_a_pack_says_of_each_learned_token_what_stands_before_it():
    rows = [
        TokenRow([10, 11, 12, 13], [2, 3], "data:1"),
        TokenRow([20, 21], [1], "data:2"),
        TokenRow([30, 31, 32, 33, 34], [1, 4], "data:3"),
    ]
    pack = pack_flat(rows)
    assert pack.ids.tolist() == [10, 11, 12, 20, 30, 31, 32, 33]  # a last token predicts nothing
    assert pack.positions.tolist() == [0, 1, 2, 0, 0, 1, 2, 3]
    assert [tuple(segment) for segment in pack.segments] == [(0, 3, -1), (3, 4, -1), (4, 8, -1)]
    found = list(zip(pack.ids[pack.target_at].tolist(), pack.target_token.tolist(), pack.target_row.tolist(), strict=True))
    assert found == [(11, 12, 0), (12, 13, 0), (20, 21, 1), (30, 31, 2), (33, 34, 2)]


def test_the_first_token_of_a_packed_row_is_never_predicted_from_the_row_before():
    rows = [sequence(length, n) for n, length in enumerate((5, 3, 9, 2))]
    pack = pack_flat(rows)
    starts = {segment.start for segment in pack.segments}
    for at, of in zip(pack.target_at.tolist(), pack.target_row.tolist(), strict=True):
        segment = pack.segments[of]
        assert segment.start <= at < segment.end
    assert len(starts) == 4
