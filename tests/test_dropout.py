"""LoRA's dropout within the operations by hand: exact for its mask, which is a function of the seed alone, wherever it is drawn."""

import pytest
import torch
from families import exact_norms, perturb, random_rows, tiny

from trimtab.core.randomness import seeded
from trimtab.data import TokenRow, pack_tree
from trimtab.engine import dropout, low_rank, operations, pack_logprobs
from trimtab.engine.backends import Norm
from trimtab.engine.patching import unfused
from trimtab.methods import attach
from trimtab.methods.lora import LoRA, LoRALayer

HEAD, *RESTS = random_rows(7, 9, 12, 5, seed=2)
ROWS = [TokenRow(ids, list(range(1, len(ids))), f"row:{n}") for n, ids in enumerate([HEAD + r for r in RESTS])]
PACK = pack_tree(ROWS)  # every token predicts, so the model's own code, which narrows nothing, draws the same masks


@pytest.fixture(params=["mask", "seed"])
def drawn(request, monkeypatch):
    """How masks are kept: as they are, as on CPUs; or by a seed, as on accelerators."""
    if request.param == "seed":
        monkeypatch.setattr(low_rank, "draw", lambda like, p: dropout.draw(_Elsewhere(like), p))
    return request.param


class _Elsewhere:
    """Says that it is on an accelerator."""

    def __init__(self, like):
        self.shape, self.device = like.shape, torch.device("cuda")


def gradients(model, adapter, recompute="none", seed=5):
    parameters = list(adapter.parameters().values())
    with seeded(seed):
        logprobs = pack_logprobs(model, PACK, recompute=recompute)
    weights = torch.linspace(-1, 2, len(ROWS), dtype=logprobs.dtype)
    return torch.cat([logprobs.detach(), *(g.flatten() for g in torch.autograd.grad(logprobs @ weights, parameters))])


def trained(p, dtype=torch.float64):
    model = tiny("qwen2", dtype)
    adapter = attach(model, LoRA(rank=4, alpha=8.0, dropout=p, targets=["q_proj", "v_proj", "up_proj", "down_proj"]))
    perturb(adapter.parameters())
    adapter.train()
    return model, adapter


def test_it_is_the_modules_code_with_the_same_masks(monkeypatch):
    exact_norms(monkeypatch)
    model, adapter = trained(0.3)
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(LoRALayer, "adapt", lambda self, x: asked.append(self) or 1 / 0)  # by hand, it is not called
        by_hand = gradients(model, adapter)
    with unfused():
        own = gradients(model, adapter)
    torch.testing.assert_close(by_hand, own, rtol=1e-10, atol=1e-10)
    assert not asked
    assert float((by_hand - gradients(model, adapter, seed=6)).abs().max()) > 1e-2  # another seed, other masks
    adapter.train(False)
    assert float((by_hand - gradients(model, adapter)).abs().max()) > 1e-2  # and none in evaluation


@pytest.mark.parametrize("recompute", ["mlp", "full"])
def test_a_seed_gives_the_same_masks_again_where_layers_are_recomputed(drawn, recompute):
    model, adapter = trained(0.3)
    once = gradients(model, adapter)
    assert torch.equal(gradients(model, adapter), once)
    torch.testing.assert_close(gradients(model, adapter, recompute), once, rtol=1e-10, atol=1e-10)


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slopes_agree():
    """By finite differences: the masks depend on the seed alone."""
    norm, weights = Norm(numbers(6, seed=9), 1.0, 1e-5), [numbers(4, 6, seed=n) for n in (5, 6)]
    x, *factors = (
        t.requires_grad_() for t in (numbers(5, 6), numbers(2, 6, seed=1), numbers(4, 2, seed=2), numbers(3, 6, seed=3))
    )

    def run(x, A, B, C):
        with seeded(3):
            layers = [
                operations.Linear(weights[0], None, A, B, 0.4),
                operations.Linear(weights[1], None, C, numbers(4, 3, seed=4)),
            ]
            again, g, u = operations.linears(x, norm, layers, [4, 4])
            down = operations.Linear(numbers(6, 4, seed=7), None, B.T, A.T, 0.4)
            return operations.linear_add(again, g, down, 0.5, (u, "silu"))

    return torch.autograd.gradcheck(run, (x, *factors), fast_mode=True, raise_exception=False)


def test_gradients_are_slopes(drawn, monkeypatch):
    assert slopes_agree()
    real, calls = low_rank.kept, []
    monkeypatch.setattr(low_rank, "kept", lambda *given: calls.append(1) or real(*given).roll(len(calls)))
    assert not slopes_agree()  # negative control: backward passes with other masks


def test_a_mask_keeps_the_share_that_it_should_and_outputs_their_mean(drawn):
    like = torch.zeros(400, 100)
    with seeded(1):
        mask = dropout.kept(low_rank.draw(like, 0.05), like, 0.05)
    assert mask.dtype == torch.bool
    assert 0.945 < float(mask.float().mean()) < 0.955
    layer = LoRA(rank=4, dropout=0.5).layer(torch.nn.Linear(8, 8, bias=False).requires_grad_(False), "")
    perturb(dict(layer.named_parameters()), 0.5)
    x = torch.ones(20_000, 8)
    linear = operations.Linear(layer.base.weight, None, layer.A.detach(), layer.scale * layer.B.detach() / 0.5, 0.5)
    mean = operations.linear_add(None, x, linear, 1.0).mean(0)
    torch.testing.assert_close(mean, layer.train(False)(x[:1])[0].detach(), rtol=0.05, atol=0.05)
