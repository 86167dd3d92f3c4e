"""On an accelerator, what a pack takes is the peaks of its allocator while packs run: here, of a counter that stands in for one."""

import math

import pytest
import torch
from families import random_rows, tiny

from trimtab.base.available_memory import free_memory
from trimtab.core.errors import RecipeError
from trimtab.data import TokenRow, pack_flat
from trimtab.engine import Workload, memory_trial, pack_logprobs, plan_memory
from trimtab.engine.memory_plan import measure_for
from trimtab.engine.memory_probe import CountedPacks, Meter
from trimtab.engine.memory_trial import TriedPacks, device_memory
from trimtab.methods import attach
from trimtab.methods.lora import LoRA


class CountedMemory(Meter):
    """A device's memory of so many bytes, whose tensors are counted."""

    def __init__(self, size=math.inf):
        super().__init__()
        self.size = size

    def holds(self):
        return self.now

    def restart(self):
        self.levels = [self.now]

    def peak(self):
        return max(self.levels)

    def wait(self):
        pass

    def __torch_dispatch__(self, *args):
        out = super().__torch_dispatch__(*args)
        if self.now > self.size:
            raise torch.OutOfMemoryError("out of memory")
        return out


@pytest.fixture(autouse=True)
def short(monkeypatch, one_thread):
    monkeypatch.setattr(memory_trial, "TOKENS", (32, 64, 128))
    monkeypatch.setattr(memory_trial, "LONG", 64)
    monkeypatch.setattr(memory_trial, "FEWEST", (60, 60))
    monkeypatch.setattr(TriedPacks, "most", 300)


def rows_of(*lengths):
    return [TokenRow(ids, list(range(1, len(ids))), f"row:{n}") for n, ids in enumerate(random_rows(*(n + 1 for n in lengths)))]


def adapted(family="llama"):
    model = tiny(family)
    attach(model, LoRA(rank=2))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    return model


@pytest.mark.parametrize("recompute", ["none", "mlp", "full"])
@pytest.mark.parametrize(
    ("family", "lengths"), [("llama", [30] * 8), ("qwen3", [240]), ("gemma2", [240]), ("gpt2", [30] * 8), ("gemma2", [64] * 4)]
)
def test_a_pack_takes_what_smaller_ones_say_that_ran(family, lengths, recompute):
    model, pack = adapted(family), pack_flat(rows_of(*lengths))
    with CountedMemory() as memory:
        profile = TriedPacks(model, memory).profile(max(lengths), 1.0, recompute=recompute)
    with Meter() as meter:
        pack_logprobs(model, pack, recompute=recompute).sum().backward()
    assert profile.peak_bytes(len(pack.ids), sum(pack.pairs)) == pytest.approx(max(meter.levels), rel=0.06)


@pytest.mark.parametrize("longest", [7, 63, 64, 100, 128, 500])
def test_no_row_is_longer_than_the_longest(longest, monkeypatch):
    """Of the data: a longer one might exceed the model's context."""
    made, real = [], memory_trial.random_pack
    monkeypatch.setattr(
        memory_trial, "random_pack", lambda model, lengths, share: made.append(lengths) or real(model, lengths, share)
    )
    with CountedMemory() as memory:
        TriedPacks(adapted(), memory).profile(longest, 1.0)
    assert len(made) == 3
    assert max(map(max, made)) <= longest
    assert all(sum(lengths) >= tokens for lengths, tokens in zip(made, memory_trial.TOKENS, strict=True))


def test_a_peak_that_the_trial_is_not_told_of_is_missed():
    """The negative control of the measure: it is the peak that counts, not what is held when a pass is over."""
    model = adapted()
    with CountedMemory() as memory:
        memory.peak = memory.holds
        profile = TriedPacks(model, memory).profile(30, 1.0)
    with Meter() as meter:
        pack_logprobs(model, pack_flat(rows_of(*[30] * 8))).sum().backward()
    assert profile.peak_bytes(240, 240 * 30) < 0.9 * max(meter.levels)


def test_packs_without_a_backward_pass_take_less():
    model = adapted()
    with CountedMemory() as memory:
        measure = TriedPacks(model, memory)
        both, forward = (measure.profile(30, 1.0, backward=backward).peak_bytes(240, 0) for backward in (True, False))
    with torch.no_grad(), Meter() as meter:
        pack_logprobs(model, pack_flat(rows_of(*[30] * 8)))
    assert forward == pytest.approx(max(meter.levels), rel=0.1)
    assert forward < 0.5 * both


def test_the_model_and_its_gradients_are_left_as_they_were():
    model = adapted()
    before = {name: p.grad.add_(1.0).clone() for name, p in model.named_parameters() if p.grad is not None}
    state = torch.get_rng_state()
    with CountedMemory() as memory:
        TriedPacks(model, memory).profile(30, 1.0)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p.grad, before[name]) for name, p in model.named_parameters() if p.grad is not None)
    assert not model.model._forward_hooks


def moments_of(model):
    """The bytes of AdamW's."""
    return 2 * sum(p.nbytes for p in model.parameters() if p.requires_grad)


def planned(free, memory=None, pack_tokens="auto", recompute="auto", steps=None, longest=30):
    model = adapted()
    with memory or CountedMemory() as counted:
        measure = TriedPacks(model, counted)
        made = plan_memory(
            model, Workload(longest, fullest_steps=steps), pack_tokens, recompute, moments_of(model), free, measure
        )
    return made, measure


def pack_of(tokens):
    return pack_flat(rows_of(*[30] * (tokens // 30), *[tokens % 30] * bool(tokens % 30)))


def needed(tokens, recompute):
    model = adapted()
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    with CountedMemory() as memory:
        peak = TriedPacks(model, memory).profile(30, 1.0, recompute=recompute).peak_bytes(tokens, 30 * tokens)
    return (peak + 3 * trained) / TriedPacks.share


def test_packs_are_as_large_as_fits_until_more_computed_again_is_cheaper():
    assert planned(1e12)[0].pack_tokens == 300
    made, _ = planned(needed(100, "none"))
    assert (made.pack_tokens, made.recomputed(pack_of(100))) == (100, "none")
    made, measure = planned(needed(57, "none"))  # fewer than are worth a pass
    assert measure.enough() == 60
    assert made.pack_tokens >= 60
    levels = [made.recomputed(pack_of(n)) for n in (30, 57, made.pack_tokens)]
    assert levels == ["none", "none", "mlp"]
    assert made.summary.endswith("gradient checkpointing of MLPs for micro-batches that do not fit")
    made, _ = planned(needed(30, "mlp"))
    assert made.recomputed(pack_of(made.pack_tokens)) == "full"


def test_fewer_tokens_are_enough_of_what_takes_longer(monkeypatch):
    monkeypatch.setattr(memory_trial, "FEWEST", (10, 90))
    found = {}
    for seconds in (1.0, 1e-9, 1e9):
        monkeypatch.setattr(memory_trial, "SECONDS", seconds * 1e-3)
        measure = TriedPacks(None, None)
        measure.rate = 50_000.0
        found[seconds] = measure.enough()
    assert found == {1.0: 50, 1e-9: 10, 1e9: 90}


def test_a_pack_that_is_found_too_large_is_planned_anew(monkeypatch):
    """What real packs take beyond made-up ones: of the first size that is tried, twice as much."""
    steps = lambda tokens: [[pack_of(tokens)]]  # noqa: E731
    free = needed(200, "none")
    expected, _ = planned(free, steps=steps)
    confirm = TriedPacks.confirm
    monkeypatch.setattr(TriedPacks, "confirm", lambda self, pack, level: 2.0 * confirm(self, pack, level))
    made, _ = planned(free, steps=steps)
    assert expected.pack_tokens == 200
    assert 0.4 * 200 < made.pack_tokens < 0.6 * 200
    with pytest.raises(RecipeError, match=r"A micro-batch of 200 tokens needs .* even with gradient checkpointing"):
        planned(free, steps=steps, pack_tokens=200)
    monkeypatch.setattr(TriedPacks, "confirm", lambda self, pack, level: 1.1 * confirm(self, pack, level))
    asked, _ = planned(free, steps=steps, pack_tokens=200)
    assert (asked.pack_tokens, asked.recomputed(pack_of(200))) == (200, "mlp")


def test_what_a_trial_has_no_room_for_is_not_tried_larger():
    model = adapted()
    with CountedMemory() as memory:
        peaks = [TriedPacks(model, memory).profile(30, 1.0, recompute=level).peak_bytes(150, 4500) for level in ("mlp", "full")]
    assert peaks[1] < 0.9 * peaks[0]
    made, _ = planned(1e12, CountedMemory(0.5 * sum(peaks)))
    assert made.recomputed(pack_of(300)) == "full", "the packs that are tried do not fit otherwise"


def test_devices_that_tell_no_peak_are_counted():
    assert device_memory(torch.device("cpu")) is None
    assert device_memory(torch.device("meta")) is None
    assert type(measure_for(adapted())) is CountedPacks
    assert device_memory(torch.device("cuda")).module is torch.cuda
    assert device_memory(torch.device("xpu")).module is torch.xpu


def test_free_memory_of_a_device_is_what_is_free_there_and_what_its_allocator_keeps(monkeypatch):
    for module in (torch.cuda, torch.xpu):
        monkeypatch.setattr(module, "mem_get_info", lambda device: (70, 100))
        monkeypatch.setattr(module, "memory_reserved", lambda device: 9)
        monkeypatch.setattr(module, "memory_allocated", lambda device: 4)
    assert [free_memory(torch.device(kind)) for kind in ("cuda", "xpu")] == [75.0, 75.0]
