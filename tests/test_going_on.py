"""Mismatched answers that go on from the pack of the answers they are given to: as if their prompts were computed again."""

import math
from dataclasses import replace

import pytest
import torch
from families import FAMILIES, exact_norms, logprob_alone, method_of, perturb, random_rows, tiny

from trimtab.base import Base
from trimtab.data import pack, pack_all, row_groups
from trimtab.data.example import TokenRow
from trimtab.data.mismatched import with_mismatched
from trimtab.data.prefix_tree import Segment, chained
from trimtab.engine import Memory, layouts
from trimtab.engine.fused import tree_attention
from trimtab.engine.fused.standins import unfused
from trimtab.engine.memory_probe import Cost
from trimtab.evaluate import score_loss
from trimtab.methods import Sample, attach
from trimtab.methods.lora import LoRA
from trimtab.objectives import Objective, Pool
from trimtab.train import TrainConfig, train

FLAT = TrainConfig(schedule="constant", warmup=0.0, clip=None)
KTO = Objective.pick({"name": "kto", "beta": 0.3, "desirable": 1.5, "undesirable": 0.5})


@pytest.fixture(autouse=True)
def going_on(monkeypatch):
    monkeypatch.setattr(pack, "WORTH_GOING_ON", 1)


def rows():
    """Prompts of 1 to 12 tokens, two of them the same, two that begin alike; answers that begin alike, too."""
    one, two, more = random_rows(12, 5, 7, seed=1)
    prompts = [one, one, one[:9] + two, *random_rows(1, 6, seed=2), more]
    answers = random_rows(4, 5, 9, 3, 6, 2, seed=3)
    answers[1] = answers[0][:2] + answers[1]
    made = [
        TokenRow(p + a, list(range(len(p), len(p + a))), f"row:{n}", len(p + a), "bad" if n % 3 else "good")
        for n, (p, a) in enumerate(zip(prompts, answers, strict=True))
    ]
    return [replace(row, reference=-30.0 - n) for n, row in enumerate(with_mismatched(made, 0))]


def gone_on(packs):
    return [one for one in packs if one.after is not None]


def test_what_goes_on_and_in_which_order():
    packs = {limit: pack_all(rows(), limit) for limit in (1, 24, 30, 1000)}
    assert [len(one.sequences) for one in packs[1]] == [1] * 6
    assert len(gone_on(packs[1])) == 6
    assert len(gone_on(packs[1000])) == len(packs[1000]) == 1
    assert any(one.mismatched for one in packs[24]), "some can't wait"
    assert any(len(one.sequences) > 1 for one in gone_on(packs[24]))
    for several in packs.values():
        everything = [row.ids for one in several for row in (*one.sequences, *(one.after.sequences if one.after else ()))]
        assert sorted(everything) == sorted(row.ids for row in rows())
        waits = [one.mismatched for one in several] + [False]
        assert sorted(waits, reverse=True) == waits, "packs without a loss first"
        learned = [one for one in several if not one.mismatched]
        last = max(n for n, one in enumerate(learned) if one.after is not None)
        assert all(one.after is not None and len(one.sequences) == 1 for one in learned[:last])
        for one in gone_on(several):
            assert (
                one.computed - len(one.ids) == len(one.after.ids) == sum(len(row.target_indices) for row in one.after.sequences)
            )
    assert not gone_on(pack_all([row for row in rows() if row.side != "mismatched"], 24))


def test_what_goes_on_stands_behind_what_it_goes_on_from():
    for one in gone_on([*pack_all(rows(), 1), *pack_all(rows(), 24), *pack_all(rows(), 1000)]):
        ids = [*one.ids.tolist(), *one.after.ids.tolist()]
        assert len(one.after.leaves) == len(one.after.sequences) == len(one.sequences)
        for number, row in enumerate(one.after.sequences):
            assert [ids[place] for place in one.after.places(number)] == row.ids[:-1]


def test_what_has_no_backward_pass_is_computed_four_times_as_much_at_a_time(monkeypatch):
    monkeypatch.setattr(pack, "WORTH_GOING_ON", 10**9)
    apart = [row for row in rows() if row.side == "mismatched"]
    for limit in (6, 12, 24):
        found = [one.ids.tolist() for one in pack_all(rows(), limit) if one.mismatched]
        assert found == [one.ids.tolist() for one in pack_all([replace(row, side=None) for row in apart], 4 * limit)]
    assert len(found) == 1


def test_little_prompts_are_not_worth_a_pass(monkeypatch):
    monkeypatch.setattr(pack, "WORTH_GOING_ON", 13)
    assert [len(one.after.sequences) for one in gone_on(pack_all(rows(), 1))] == [1], "the one of 14"


def logprobs(model, packs, recompute=False):
    found = {}
    for one in packs:
        seen = Pool(KTO)
        seen.add = lambda after, values: found.update(
            {tuple(r.ids): v for r, v in zip(after.sequences, values.tolist(), strict=True)}
        )
        own = seen.pass_through(model, one, recompute=recompute)
        found.update({tuple(r.ids): v for r, v in zip(one.sequences, own.tolist(), strict=True)})
    return [found[tuple(row.ids)] for row in rows()]


@pytest.mark.parametrize("by", ["hand", "hand, recomputed", "the model's code"])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_that_go_on_are_what_they_are_alone(family, by, monkeypatch):
    exact_norms(monkeypatch)
    model = tiny(family, torch.float64)
    perturb(attach(model, method_of("lora")).parameters())
    alone = [float(logprob_alone(model, row.ids, row.target_indices).detach()) for row in rows()]
    for limit in (1, 24, 1000):
        packs = pack_all(rows(), limit)
        assert gone_on(packs)
        if by == "the model's code":
            with unfused():
                found = logprobs(model, packs)
        else:
            found = logprobs(model, packs, "recomputed" in by)
        assert found == pytest.approx(alone, rel=1e-6 if family in ("cohere", "gemma2") else 1e-10)


def memory_of(room=math.inf, waiting=math.inf):
    """A plan in which packs that take more than that are computed twice, and gradients of more than that do not wait."""
    return Memory(1, Cost(0.0, 1.0), room, 1e6, waiting, 0.0, 0.0, "")


def step(method, family, limit, memory=None):
    base = Base(tiny(family, torch.float64))
    adapter = attach(base.model, method_of(method), sample=Sample(rows=random_rows(40, seed=5)))
    perturb(adapter.parameters(), 0.1)
    (done,) = train(base, adapter, KTO, [pack_all(rows(), limit)], FLAT, 1e-3, memory)
    return done, {name: p.detach().clone() for name, p in adapter.parameters().items()}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["lora", "bottleneck", "prefix", "ptuning_v2", "prompt", "ia3", "dora", "full"])
def test_a_step_is_the_same_however_mismatched_answers_are_computed(method, family, monkeypatch, one_thread):
    exact_norms(monkeypatch)
    results = [step(method, family, limit) for limit in (1, 24, 1000)]
    results.append(step(method, family, 1, memory_of(room=-1.0)))
    results.append(step(method, family, 1, memory_of(waiting=0.0)))
    monkeypatch.setattr(pack, "WORTH_GOING_ON", 10**9)
    apart, expected = step(method, family, 24)
    assert apart.measures["kl"] > 0.1, "what is estimated counts"
    for done, learned in results:
        assert done.loss == pytest.approx(apart.loss, rel=1e-9)
        assert done.grad_norm == pytest.approx(apart.grad_norm, rel=1e-6)
        assert done.measures == pytest.approx(apart.measures, rel=1e-6)
        assert (done.items, done.tokens) == (apart.items, apart.tokens)
        for name, value in expected.items():
            torch.testing.assert_close(learned[name], value, rtol=0, atol=1e-7)
    assert results[0][0].computed < apart.computed


def test_held_out_rows_are_scored_the_same(monkeypatch):
    base = Base(tiny("llama", torch.float64))
    perturb(attach(base.model, method_of("lora")).parameters())
    found = [score_loss(base, rows(), limit, KTO) for limit in (1, 24, 1000)]
    monkeypatch.setattr(pack, "WORTH_GOING_ON", 10**9)
    apart = score_loss(base, rows(), 24, KTO)
    for one in found:
        assert one.loss == pytest.approx(apart.loss, rel=1e-6)
        assert one.measures == pytest.approx(apart.measures, rel=1e-6)
        assert (one.tokens, one.rows) == (apart.tokens, apart.rows) == (sum(len(r.target_indices) for r in rows()[::2]), 6)


@pytest.mark.parametrize("broken", ["nothing is left", "another token's"])
def test_earlier_tokens_that_are_not_seen_rightly_are_noticed(broken, monkeypatch):
    seen = layouts.PackLayout.seen

    def wrongly(self, layer, dim, *own):
        if self.first:
            self.earlier[id(layer)] = tuple(
                0 * t if broken == "nothing is left" else t.roll(1, dim) for t in self.earlier[id(layer)]
            )
        return seen(self, layer, dim, *own)

    monkeypatch.setattr(layouts.PackLayout, "seen", wrongly)
    with pytest.raises(AssertionError):
        test_answers_that_go_on_are_what_they_are_alone("llama", "hand", monkeypatch)


def test_epochs_after_the_first_know_nothing_of_packs_that_others_go_on_from(monkeypatch):
    """What frozen layers made of a row is kept, but the keys and values in them are not."""
    results = []
    for worth in (1, 10**9):
        monkeypatch.setattr(pack, "WORTH_GOING_ON", worth)
        base = Base(tiny("llama", torch.float64))
        adapter = attach(base.model, LoRA(targets=("model.layers.1.self_attn.q_proj",)))
        perturb(adapter.parameters(), 0.1)
        several, config = [pack_all(rows(), 24)] * 3, FLAT.model_copy(update={"epochs": 3})
        results.append([done.loss for done in train(base, adapter, KTO, several, config, 1e-2)])
    assert results[0] == pytest.approx(results[1], rel=1e-6)
    assert results[0][0] != results[0][2]


def test_segments_are_parted_before_tokens_and_only_there():
    tree = (Segment(0, 10, -1), Segment(10, 12, 0), Segment(12, 20, 0), Segment(20, 25, 2))
    assert chained(tree, []) == tree
    assert chained(tree, [0, 4, 10, 12, 15, 15, 25]) == (
        Segment(0, 4, -1), Segment(4, 10, 0), Segment(10, 12, 1), Segment(12, 15, 1), Segment(15, 20, 3), Segment(20, 25, 4),
    )  # fmt: skip


def test_steps_count_what_goes_on_as_computed():
    done, _ = step("lora", "llama", 1)
    learned = [rows()[unit[0]] for unit in row_groups(rows())]
    assert done.tokens == sum(row.full_length for row in learned)
    assert done.computed == sum(len(row.ids) - 1 for row in learned) + sum(len(r.target_indices) for r in rows()[1::2])


@pytest.mark.parametrize("window", [None, 33])
@pytest.mark.parametrize("virtual", [0, 7])
def test_attention_of_the_later_tokens_alone(way, window, virtual):
    tree = (Segment(0, 300, -1), Segment(300, 340, 0), Segment(340, 900, 1), Segment(900, 930, 0), Segment(930, 940, -1))
    sizes, draw = tree_attention.Sizes(2, 3, 16), torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(940, w, generator=draw, dtype=torch.float64) for w in (96, 32, 32))
    angles = torch.randn(940, 8, generator=draw, dtype=torch.float64).repeat(1, 2)
    before = tuple(torch.randn(2, virtual, 16, generator=draw, dtype=torch.float64) for _ in "kv") if virtual else None
    sight = tree_attention.Sight(tree, virtual, window)
    given = (k, v, angles.cos(), angles.sin())
    whole = tree_attention.attend(q, *given, sight, sizes, 0.25, before)
    with torch.no_grad():
        part = tree_attention.attend(q[340:], *given, sight._replace(first=340), sizes, 0.25, before)
    torch.testing.assert_close(part, whole[340:], rtol=0, atol=1e-13)
