"""What only a GPU can show, in seconds: skipped elsewhere. benchmarks/gpu.py measures at real sizes."""

import warnings

import pytest
import torch
from families import perturb, random_rows, tiny

from trimtab.base import Base
from trimtab.data.example import TokenRow
from trimtab.data.pack import pack_tree
from trimtab.engine import check_packing, pack_logprobs
from trimtab.engine.backends import Norm, passes, probing
from trimtab.engine.backends.survey import survey
from trimtab.methods import attach
from trimtab.methods.lora import LoRA
from trimtab.objectives.sft import SFT
from trimtab.train import TrainConfig, train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
DEVICE = torch.device("cuda", 0)
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 8e-3}


def rows():
    head = random_rows(9, seed=1)[0]
    return [TokenRow(head + random_rows(4 + n, seed=n)[0], list(range(7, 13 + n)), f"row {n}", 13 + n) for n in range(4)]


def adapted(family, dtype, device):
    base = Base(tiny(family, dtype).to(device))
    adapter = attach(base.model, LoRA(rank=3, alpha=3.0))
    perturb(adapter.parameters())
    return base, adapter


def test_everything_faster_than_the_reference_is_proved():
    if torch.cuda.get_device_capability(DEVICE) < (8, 0):
        pytest.skip("an older card")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        ways = list(survey(DEVICE))
    assert [way for way in ways if way.problem] == []
    assert {way.by for way in ways if way.operation in ("norms", "gates", "softmax")} == {"Triton"}
    assert {way.by.partition(" by ")[0] for way in ways if way.dtype == "bfloat16" and "attention" in way.operation} == {
        "flash attention"
    }


@pytest.mark.parametrize("n", [8, 128, 1536, 3584, 8192, 16384, 50_000])
def test_norms_of_rows_of_every_length(n):
    draw = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(33, n, generator=draw).to(DEVICE, torch.bfloat16) for _ in range(2))
    norm = Norm(torch.randn(n, generator=draw).to(DEVICE, torch.bfloat16), 1.0, 1e-6)
    y, rstd = passes.rms_norm(x, norm)
    dx = passes.rms_norm_backward(dy, x, norm, rstd, dy)
    (probe,) = (one for one in probing.probes() if one.what == "norms by Triton" and one.key[2:] == (torch.bfloat16, n, 2))
    assert not probe.problem
    leaf = x.double().requires_grad_()
    exact = leaf / (leaf.square().mean(1, keepdim=True) + 1e-6).sqrt() * (1 + norm.weight.double())
    (gradient,) = torch.autograd.grad(exact, leaf, dy.double())
    for ours, reference in ((y, exact.detach()), (dx, gradient + dy.double())):
        assert float((ours.double() - reference).norm() / reference.norm()) < 3e-3


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3", "phi3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_log_probabilities_and_gradients_are_those_of_the_cpu(family, dtype):
    results = []
    for place, held in ((DEVICE, dtype), (torch.device("cpu"), torch.float64)):
        base, adapter = adapted(family, dtype, "cpu")
        base.model.to(place, held) if held == torch.float64 else base.model.to(place)
        check_packing(base.model)
        logprobs = pack_logprobs(base.model, pack_tree(rows()).to(place))
        gradients = torch.autograd.grad(logprobs.sum(), list(adapter.parameters().values()))
        results.append([t.detach().cpu().double().flatten() for t in (logprobs, torch.cat([g.flatten() for g in gradients]))])
    for ours, exact in zip(*results, strict=True):
        assert float((ours - exact).norm() / exact.norm()) < BOUNDS[dtype]


def test_a_pass_does_not_wait_for_the_device():
    base, _ = adapted("qwen3", torch.bfloat16, DEVICE)
    packs = [pack_tree(rows()).to(DEVICE) for _ in range(2)]
    pack_logprobs(base.model, packs[0]).sum().backward()  # probes wait, once
    torch.cuda.set_sync_debug_mode("error")
    try:
        pack_logprobs(base.model, packs[1]).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_deterministic_runs_are_the_same_to_the_bit():
    config = TrainConfig(deterministic=True, pack_tokens=64, recompute="none", warmup=0.0)
    states = []
    for _ in range(3):
        base, adapter = adapted("qwen3", torch.bfloat16, DEVICE)
        list(train(base, adapter, SFT(), [[pack_tree(rows())]] * 5, config, 1e-2))
        states.append(torch.cat([t.flatten().float().cpu() for t in adapter.state().values()]))
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])
