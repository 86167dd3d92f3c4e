"""NEFTune: Transformers' own noise on the same numbers, whatever packs a row is in, and only in training."""

import copy
import math

import pytest
import torch
from families import exact_norms, logprob_alone, perturb, random_rows, tiny
from transformers.integrations.neftune import neftune_post_forward_hook

import trimtab
from trimtab.base import Base
from trimtab.core.errors import RecipeError
from trimtab.data import pack_all, pack_flat, pack_tree
from trimtab.data.example import TokenRow
from trimtab.engine import MemoryPlan, pack_logprobs
from trimtab.evaluate import score_loss
from trimtab.methods import attach
from trimtab.methods.lora import LoRA
from trimtab.methods.prompt import PromptTuning
from trimtab.objectives.dpo import DPO
from trimtab.objectives.sft import SFT
from trimtab.run.recipe import Recipe
from trimtab.train import TrainConfig, TrainingSteps, neftune, plan_training_memory, train
from trimtab.train.neftune import noisy_embeddings, pack_noise, row_noise

ALPHA, SEED, STEP = 5.0, 3, 7
PREFIX = random_rows(12)[0]
ROWS = [
    TokenRow([*PREFIX, *ids], list(range(14, 12 + len(ids))), f"row:{n}", 12 + len(ids))
    for n, ids in enumerate(random_rows(9, 14, 8, 11, seed=1))
]


def adapted(family="llama", dtype=torch.float64):
    base = Base(tiny(family, dtype))
    adapter = attach(base.model, LoRA(rank=3))
    perturb(adapter.parameters(), 0.1)
    return base, adapter


def theirs(base, row, monkeypatch):
    """Σ log p of a row alone, by the model's own pass with Transformers' hook, which is given the row's numbers to scale."""
    numbers = row_noise(row, len(row.ids), base.model.config.get_text_config().hidden_size, SEED, STEP)

    def planted(tensor, low, high):
        assert low == -high
        return (numbers.to(tensor.dtype) * high)[None]

    embeddings = base.model.get_input_embeddings()
    embeddings.neftune_noise_alpha = ALPHA
    hook = embeddings.register_forward_hook(neftune_post_forward_hook)
    embeddings.training = True
    try:
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "uniform_", planted)
            return logprob_alone(base.model, row.ids, row.target_indices)
    finally:
        hook.remove()
        embeddings.training = False


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_it_is_transformers_noise(family, monkeypatch):
    """Loss and gradient, also with embeddings that the model scales (Gemma)."""
    exact_norms(monkeypatch)
    base, adapter = adapted(family)
    found = []
    for compute in (lambda: noisy(base), lambda: torch.stack([theirs(base, row, monkeypatch) for row in ROWS])):
        values = compute()
        values.sum().backward()
        found.append((values.detach(), {name: p.grad.clone() for name, p in adapter.parameters().items()}))
        for parameter in adapter.parameters().values():
            parameter.grad = None
    (ours, our_gradients), (reference, gradients) = found
    assert torch.allclose(ours, reference, rtol=1e-6)  # the numbers are made in float32
    for name, gradient in gradients.items():
        assert (our_gradients[name] - gradient).abs().max() < 1e-6 * gradient.abs().max(), name
    without = pack_logprobs(base.model, pack_flat(ROWS)).detach()
    assert not torch.allclose(ours, without, rtol=1e-4), "the control: without noise"


def test_virtual_tokens_have_none():
    """Noise for other than the pack's tokens would not have their shape."""
    base = Base(tiny("llama", torch.float64))
    attach(base.model, PromptTuning(tokens=4, init="random"))
    assert not torch.allclose(noisy(base), pack_logprobs(base.model, pack_flat(ROWS)), rtol=1e-4)


def noisy(base):
    pack = pack_flat(ROWS)
    with noisy_embeddings(base.model, pack, ALPHA, SEED, STEP):
        return pack_logprobs(base.model, pack)


def taken(pack_tokens, **settings):
    base, adapter = adapted(dtype=torch.float32)
    config = TrainConfig(lr=1e-2, rows_per_step=4, epochs=3, neftune=ALPHA, **settings)
    memory = plan_training_memory(base, config.model_copy(update={"pack_tokens": pack_tokens}), ROWS)
    steps = TrainingSteps(ROWS, config, memory)
    values = [(step.loss, step.computed) for step in train(base, adapter, SFT(), steps, config, 1e-2, memory)]
    return [loss for loss, _ in values], sum(count for _, count in values), steps


def test_a_rows_noise_does_not_depend_on_its_pack(monkeypatch):
    losses, computed, steps = taken(512)
    others, _, _ = taken(25)
    assert losses == pytest.approx(others, rel=1e-5)
    assert computed == 3 * sum(len(row.ids) - 1 for row in ROWS), "shared prefixes are not shared"
    assert len(steps[0]) == 1
    assert losses != pytest.approx(taken(512, seed=1)[0], rel=1e-4)
    real = row_noise  # the control: noise by the place in a pack
    places = iter(range(10_000))
    monkeypatch.setattr(neftune, "row_noise", lambda row, *more: real(ROWS[next(places) % 4], *more))
    assert taken(512)[0] != pytest.approx(taken(25)[0], rel=1e-5)


def test_flat_packs_hold_every_row_once_and_groups_together():
    pairs = [TokenRow(row.ids, row.target_indices, row.where, row.full_length, side) for row, side in
             zip(ROWS, ("chosen", "rejected") * 2, strict=True)]  # fmt: skip
    for rows in (ROWS, pairs):
        packs = pack_all(rows, 45, share=False)
        assert sorted(row.where for pack in packs for row in pack.rows) == [row.where for row in ROWS]
        assert all(len(pack.ids) == sum(len(row.ids) - 1 for row in pack.rows) for pack in packs)
        assert len(pack_all(rows, 45)) <= len(packs)
    assert all(len(pack.rows) == 2 for pack in pack_all(pairs, 45, share=False))


def test_the_numbers_are_uniform_and_of_the_papers_size():
    row = TokenRow(list(range(3, 203)), [150], "long", 200)
    noise = pack_noise(pack_flat([row]), ALPHA, 512, 0, 1)
    most = ALPHA / math.sqrt(200 * 512)
    assert noise.shape == (199, 512)
    assert noise.abs().max() <= most
    assert noise.mean().abs() < 4 * most / math.sqrt(3 * noise.numel())
    assert noise.var() == pytest.approx(most**2 / 3, rel=0.02)
    again = pack_noise(pack_flat([row]), ALPHA, 512, 0, 1)
    assert torch.equal(noise, again)
    assert all(not torch.equal(noise, pack_noise(pack_flat([row]), ALPHA, 512, *other)) for other in ((1, 1), (0, 2)))


def test_there_is_none_outside_training():
    base, _ = adapted()
    before = score_loss(base, ROWS).sums
    with pytest.raises(KeyError), noisy_embeddings(base.model, pack_flat(ROWS), ALPHA, 0, 1):
        raise KeyError
    assert score_loss(base, ROWS).sums == before
    with noisy_embeddings(base.model, pack_tree(ROWS), 0.0, 0, 1):
        assert score_loss(base, ROWS).sums == before


def test_comparisons_with_a_reference_are_refused():
    raw = {"data": {"train": "a.jsonl"}, "train": {"neftune": 5.0}}
    with pytest.raises(RecipeError, match=r"train\.neftune: dpo compares with a reference model"):
        Recipe.parse({**copy.deepcopy(raw), "objective": "dpo"})
    assert Recipe.parse({**copy.deepcopy(raw), "objective": "simpo"}).train.neftune == 5.0
    base, adapter = adapted()
    with pytest.raises(RecipeError, match=r"train\.neftune: dpo"):
        next(trimtab.fit(base, adapter, ROWS, DPO(), neftune=5.0))


def test_frozen_outputs_which_would_lack_it_are_not_kept():
    assert TrainConfig(epochs=2).keeps_frozen_outputs
    assert not TrainConfig(epochs=2, neftune=1.0).keeps_frozen_outputs
    assert isinstance(plan_training_memory(adapted()[0], TrainConfig(neftune=1.0), ROWS), MemoryPlan)
