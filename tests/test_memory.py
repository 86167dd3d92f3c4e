"""What is kept is measured, what does not fit is recomputed, and neither changes what is learned."""

import math

import pytest
import torch
from families import FAMILIES, perturb, random_rows, tiny

import trimtab
from trimtab.data import Sequence, pack_flat, pack_tree
from trimtab.engine import memory, pack_logprobs, plan_memory
from trimtab.engine.memory import bytes_per_token, free_memory
from trimtab.errors import RecipeError
from trimtab.methods import Method, Sample, active, attach
from trimtab.methods.lora import LoRA
from trimtab.objectives import _pooling

ROWS = [Sequence(ids, list(range(3, len(ids))), f"row:{n}") for n, ids in enumerate(random_rows(40, 17, 25, 9))]


def gradients(model, adapter, recompute):
    adapter.train()
    torch.manual_seed(0)
    logprobs = pack_logprobs(model, pack_tree(ROWS), recompute=recompute)
    return logprobs.detach(), torch.autograd.grad(logprobs.sum(), list(adapter.parameters().values()))


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputation_changes_nothing_to_the_last_bit(family):
    model = tiny(family)
    adapter = attach(model, LoRA(rank=2, dropout=0.3))
    perturb(adapter.parameters())
    (ours, ours_back), (plain, plain_back) = gradients(model, adapter, True), gradients(model, adapter, False)
    assert torch.equal(ours, plain)
    assert all(torch.equal(a, b) for a, b in zip(ours_back, plain_back, strict=True))


@pytest.mark.parametrize("name", ["bottleneck", "prefix", "prompt", "ia3", "dora", "oft"])
def test_every_kind_of_method_is_recomputed(name):
    model = tiny("qwen3")
    adapter = attach(
        model, Method.member(name)(**({"block_size": 16} if name == "oft" else {})), sample=Sample(random_rows(30))
    )
    perturb(adapter.parameters(), 0.05)
    (ours, ours_back), (plain, plain_back) = gradients(model, adapter, True), gradients(model, adapter, False)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(ours_back, plain_back)


def test_what_acts_in_a_block_acts_when_it_is_recomputed_after_it():
    model = tiny("llama")
    for n, name in enumerate(("one", "two")):
        perturb(attach(model, LoRA(rank=2), name=name).parameters(), seed=n)
    found = []
    for recompute in (True, False):
        with active(model, "one"):
            logprobs = pack_logprobs(model, pack_flat(ROWS), recompute=recompute)
        logprobs.sum().backward()  # outside, where "two" acts
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and p.grad.any()})
        model.zero_grad()
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])


def kept(model, tokens, recompute):
    row = Sequence(random_rows(tokens + 1)[0], list(range(1, tokens + 1)), "row")
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = (tensor, tensor.untyped_storage().nbytes())
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        pack_logprobs(model, pack_flat([row]), recompute=recompute)
    return sum(size for at, (_, size) in storages.items() if at not in weights)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_a_token_keeps_what_was_measured(family):
    model = tiny(family)
    attach(model, LoRA(rank=2))
    expected = bytes_per_token(model)
    assert (kept(model, 60, False) - kept(model, 30, False)) / 30 == pytest.approx(expected, rel=0.1)
    assert kept(model, 60, True) < 0.5 * kept(model, 60, False)


def plan(longest=50, pack_tokens="auto", recompute="auto", free=math.inf):
    model = tiny("llama")
    attach(model, LoRA(rank=2))
    return plan_memory(model, longest, pack_tokens, recompute, free), bytes_per_token(model)


def test_with_room_nothing_is_recomputed():
    made, _ = plan(free=1e12)
    assert (made.pack_tokens, made.most_kept >= 1024) == (1024, True)
    assert made.words.startswith("1,024 tokens at a time, up to 0.0")
    assert made.words.endswith("GB of activations, of 1000.0 GB free; nothing is computed twice")


def test_with_less_room_packs_are_smaller_and_long_rows_recomputed():
    _, per_token = plan()
    made, _ = plan(longest=150, free=100 * per_token / memory.SHARE)
    assert made.pack_tokens == 100
    assert 99 <= made.most_kept <= 100
    assert made.words.endswith("packs of more than 100 tokens are computed twice")
    asked, _ = plan(longest=50, pack_tokens=150, free=100 * per_token / memory.SHARE)
    assert (asked.pack_tokens, asked.most_kept <= 100) == (150, True)


def test_what_is_asked_for_is_done():
    assert plan(recompute="full")[0].most_kept == 0
    assert plan(recompute="full")[0].words.endswith("every pack is computed twice")
    _, per_token = plan()
    assert plan(recompute="none", pack_tokens=500, free=per_token)[0].most_kept == math.inf


def test_a_row_that_cannot_fit_is_refused_before_it_is_tried():
    _, per_token = plan()
    with pytest.raises(
        RecipeError, match=r"A pack of 5,000 tokens needs .* GB for its activations, .* Lower data.max_length\."
    ):
        plan(longest=5_000, free=100 * per_token)
    with pytest.raises(RecipeError, match=r"Lower data.max_length or train.pack_tokens\."):
        plan(longest=50, pack_tokens=5_000, free=100 * per_token)


def test_free_memory_is_what_the_system_and_the_container_say(monkeypatch):
    said = {
        "/proc/meminfo": "MemTotal: 64 kB\nMemAvailable:   1000 kB\n",
        "/sys/fs/cgroup/memory.max": "900000\n",
        "/sys/fs/cgroup/memory.current": "300000\n",
    }
    monkeypatch.setattr(memory.Path, "exists", lambda self: str(self) in said)
    monkeypatch.setattr(memory.Path, "read_text", lambda self: said[str(self)])
    assert free_memory(torch.device("cpu")) == 600_000
    said["/sys/fs/cgroup/memory.max"] = "max\n"
    assert free_memory(torch.device("cpu")) == 1_024_000
    said.clear()
    assert free_memory(torch.device("cpu")) == math.inf


def test_training_recomputes_what_does_not_fit_and_learns_the_same(monkeypatch):
    losses, asked = [], []
    real = _pooling.pack_logprobs

    def watching(model, pack, *, recompute, **others):
        asked.append((len(pack.ids), recompute))
        return real(model, pack, recompute=recompute, **others)

    monkeypatch.setattr(_pooling, "pack_logprobs", watching)
    for free in (math.inf, None):
        base = trimtab.Base(tiny("llama"))
        adapter = trimtab.attach(base.model, LoRA(rank=2))
        share = 30 * bytes_per_token(base.model) / memory.SHARE if free is None else free
        monkeypatch.setattr(memory, "free_memory", lambda device, share=share: share)
        losses.append([step.loss for step in trimtab.fit(base, adapter, ROWS, epochs=2, rows_per_step=2, lr=1e-2)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert {size > 30 for size, recompute in asked if recompute} == {True}
    assert {recompute for _, recompute in asked} == {True, False}
