"""What a pack keeps for its backward pass lies where the last pack's did, and that changes nothing."""

import pytest
import torch
from families import FAMILIES, method_of, perturb, random_rows, tiny

from trimtab.base import Base
from trimtab.core.errors import NonFinite
from trimtab.data import TokenRow, pack_all
from trimtab.engine import Workload, arena, plan_memory
from trimtab.engine.arena import ActivationArena
from trimtab.methods import Sample, attach
from trimtab.methods.lora import LoRA
from trimtab.objectives.sft import SFT
from trimtab.train import TrainConfig, train

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = (9, 33, 14, 50, 6, 21, 40, 8)
ROWS = [TokenRow(ids, list(range(2, len(ids))), f"row:{n}") for n, ids in enumerate(random_rows(*LENGTHS))]
STEPS = [pack_all(ROWS[n : n + 4], 30) for n in (0, 4, 2, 0)]
"""Packs that grow and shrink."""


def trained(family="llama", method=None, *, memory=True, recompute="auto", epochs=1):
    base = Base(tiny(family))
    adapter = attach(base.model, method or LoRA(rank=3), sample=Sample(rows=random_rows(40, seed=5)))
    perturb(adapter.parameters(), 0.1)
    plan = plan_memory(base.model, Workload(max(LENGTHS)), 30, recompute, 0.0) if memory else None
    losses = [step.loss for step in train(base, adapter, SFT(), STEPS, TrainConfig(epochs=epochs), 1e-2, plan)]
    return losses, adapter.state()


def assert_same(one, other):
    assert one[0] == other[0]
    assert all(torch.equal(tensor, other[1][name]) for name, tensor in one[1].items())


@pytest.mark.parametrize("family", FAMILIES)
def test_training_is_the_same_to_the_last_bit(family):
    assert_same(trained(family), trained(family, memory=False))


@pytest.mark.parametrize("method", ["bottleneck", "prefix", "ia3", "full", "dora"])
def test_whatever_the_method(method):
    assert_same(trained(method=method_of(method)), trained(method=method_of(method), memory=False))


def test_beside_what_is_known_of_frozen_layers():
    """Their hidden states are kept from epoch to epoch, and must not lie where the next pack writes."""
    upper = LoRA(rank=3, targets=[r"model\.layers\.1\..*_proj"])
    assert_same(trained(method=upper, epochs=2), trained(method=upper, epochs=2, memory=False))


def test_it_is_used_and_large_enough(monkeypatch):
    taken, used = [], []
    take = ActivationArena.allocate

    def noted(self, *given):
        taken.append((self, take(self, *given)))
        used.append(self.used)
        return taken[-1][1]

    monkeypatch.setattr(ActivationArena, "allocate", noted)
    trained()
    (block,) = {id(one): one for one, _ in taken}.values()
    assert {tensor.untyped_storage().data_ptr() for _, tensor in taken} == {block.bytes.untyped_storage().data_ptr()}
    assert block.used <= len(block.bytes)
    assert max(used) > 0.7 * len(block.bytes)  # of what the largest pack keeps; the rest is what torch's own operations keep
    assert all(tensor.data_ptr() % 64 == 0 for _, tensor in taken)


def test_what_no_backward_pass_needs_takes_no_place_in_it(monkeypatch):
    """Frozen layers below the lowest trained one keep nothing: their tensors are gone when the next layer has them."""
    blocks = set()
    take = ActivationArena.allocate
    monkeypatch.setattr(ActivationArena, "allocate", lambda self, *given: blocks.add(self) or take(self, *given))
    used = {}
    for targets in (r"model\.layers\.1\..*_proj", "all-linear"):
        blocks.clear()
        trained(method=LoRA(rank=3, targets=[targets]))
        (block,) = blocks
        used[targets] = block.used
    assert used[r"model\.layers\.1\..*_proj"] < 0.6 * used["all-linear"]


def test_what_does_not_fit_lies_elsewhere():
    block = ActivationArena(1000)
    with block.reuse():
        first, second = (arena.activation_like(torch.zeros(1), 12, 10) for _ in range(2))
        first.fill_(1)
        second.fill_(2)
        third = arena.activation_like(torch.zeros(1), 12, 10)
        third.fill_(3)
    assert [float(t.mean()) for t in (first, second, third)] == [1, 2, 3]
    assert third.untyped_storage().data_ptr() != block.bytes.untyped_storage().data_ptr()
    with block.reuse():
        assert arena.activation_like(torch.zeros(1), 12, 10).data_ptr() == first.data_ptr()
    assert arena.activation_like(torch.zeros(1), 12, 10).data_ptr() != first.data_ptr()  # outside


def test_recomputed_packs_do_without(monkeypatch):
    expected = trained(memory=False)
    monkeypatch.setattr(ActivationArena, "allocate", lambda *_: pytest.fail("taken"))
    assert_same(trained(recompute="full"), expected)


def test_memory_given_twice_is_noticed(monkeypatch):
    """The control: two tensors of a pack in one place."""

    def always_first(self, like, rows, columns):
        return like.new_empty(0).set_(self.bytes.untyped_storage(), 0, (rows, columns), (columns, 1))

    expected = trained(memory=False)
    monkeypatch.setattr(ActivationArena, "allocate", always_first)
    with pytest.raises((AssertionError, RuntimeError, NonFinite)):
        assert_same(trained(), expected)


def test_gradients_are_let_go_of_at_the_end():
    base = Base(tiny("llama"))
    adapter = attach(base.model, LoRA(rank=3))
    list(train(base, adapter, SFT(), STEPS[:1], TrainConfig(), 1e-2))
    assert all(p.grad is None for p in adapter.parameters().values())
