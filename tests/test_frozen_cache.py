"""Frozen layers below the lowest trained one: computed once a row, and the same training."""

import pytest
import torch
from families import exact_norms, random_rows, tiny

from trimtab import Base
from trimtab.data import TokenRow, pack_all, pack_tree
from trimtab.engine import FrozenLayerCache, pack_logprobs
from trimtab.methods import attach
from trimtab.methods.lora import LoRA
from trimtab.objectives.sft import SFT
from trimtab.train import TrainConfig, train

UPPER = LoRA(rank=2, targets=(r".*layers\.1\..*_proj",))


def rows():
    head, *rest = random_rows(10, 12, 3, 9, 17, seed=4)
    ids = [head + rest[0], head + rest[1], rest[2], head + rest[0][:6] + rest[3]]
    return [TokenRow(row, list(range(len(row) // 2, len(row))), f"row:{n}") for n, row in enumerate(ids)]


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    exact_norms(monkeypatch)


def counted(model, monkeypatch):
    """How many tokens each layer computes."""
    counts = {}
    for number, layer in enumerate(model.model.layers):
        attention, own = layer.input_layernorm, type(layer.input_layernorm).forward

        def forward(x, attention=attention, own=own, number=number):
            counts[number] = counts.get(number, 0) + x.shape[-2]
            return own(attention, x)

        monkeypatch.setattr(attention, "forward", forward)
    return counts


def trained(epochs, method=UPPER, family="llama", monkeypatch=None):
    """Losses of some epochs, each of which packs the rows in another way; and what each layer computed."""
    base = Base(tiny(family, torch.float64), None)
    adapter = attach(base.model, method)
    counts = counted(base.model, monkeypatch) if monkeypatch else {}
    ones = rows()
    orders = [[[0, 1, 2, 3]], [[2, 0], [3, 1]], [[3, 2, 1, 0]]]
    steps = [pack_all([ones[n] for n in step], 60) for order in orders for step in order]
    config = TrainConfig(epochs=epochs, schedule="constant", warmup=0.0)
    return [step.loss for step in train(base, adapter, SFT(), steps, config, 1e-2)], counts


@pytest.mark.parametrize("family", ["llama", "gemma3", "cohere"])
def test_known_rows_train_the_same(family):
    """One epoch keeps nothing, so it is the reference."""
    known, plain = trained(3, family=family)[0], trained(1, family=family)[0]
    assert len(set(plain)) == len(plain) > 3
    torch.testing.assert_close(torch.tensor(known), torch.tensor(plain), rtol=1e-10, atol=0)


def test_the_layers_below_compute_each_row_once(monkeypatch):
    _, counts = trained(3, monkeypatch=monkeypatch)
    once = sum(len(pack.ids) for pack in pack_all(rows(), 60))
    assert counts[0] == once < counts[1] / 2


def test_what_is_kept_wrong_is_noticed(monkeypatch):
    """The negative control."""
    monkeypatch.setattr(FrozenLayerCache, "_gathered", lambda self, pack: torch.zeros(len(pack.ids), 32, dtype=torch.float64))
    assert trained(3)[0] != pytest.approx(trained(1)[0], rel=1e-3)


@pytest.mark.parametrize("method", [
    LoRA(rank=2), LoRA(rank=2, targets=(r".*layers\.0\..*",)), LoRA(rank=2, targets=("all-linear", "embed_tokens")),
])  # fmt: skip
def test_nothing_is_kept_where_something_is_trained_below(method, monkeypatch):
    model = tiny("llama")
    attach(model, method)
    assert FrozenLayerCache(model, 1e9).lowest is None


def test_nothing_is_kept_below_a_layer_that_drops_at_random():
    model = tiny("llama")
    attach(model, UPPER)
    assert FrozenLayerCache(model, 1e9).lowest is model.model.layers[1]
    model.train()
    assert FrozenLayerCache(model, 1e9).lowest is None


def test_rows_for_which_there_is_no_room_are_computed_again():
    model = tiny("llama")
    attach(model, UPPER)
    ones = rows()
    size = model.config.hidden_size * 4
    below = FrozenLayerCache(model, size * (len(ones[0].ids) - 1 + len(ones[2].ids) - 1))
    before = pack_logprobs(model, pack_tree(ones), frozen_cache=below)
    assert [row.where for row, _ in below.rows.values()] == ["row:0", "row:2"]
    assert below.free == 0
    torch.testing.assert_close(pack_logprobs(model, pack_tree(ones), frozen_cache=below), before)
    few = [ones[2], ones[0]]
    torch.testing.assert_close(pack_logprobs(model, pack_tree(few), frozen_cache=below), pack_logprobs(model, pack_tree(few)))


def test_rows_that_are_equal_are_not_mistaken_for_each_other():
    """A row is known by what it is, not by what it says: another of the same place and tokens is computed."""
    model = tiny("llama")
    attach(model, UPPER)
    below = FrozenLayerCache(model, 1e9)
    pack_logprobs(model, pack_tree(rows()), frozen_cache=below)
    pack_logprobs(model, pack_tree(rows()), frozen_cache=below)
    assert len(below.rows) == 2 * len(rows())
