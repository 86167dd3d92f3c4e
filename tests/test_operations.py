"""Back ends, and the operations that call them: each against the plain formula."""

import inspect
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from trimtab.engine import backends, operations
from trimtab.engine.backends import Backend, Norm, backend_for, cpu
from trimtab.engine.backends import torch as torch_backend

KINDS = [(torch.float64, 1e-12), (torch.float32, 2e-6)]


def close(ours, exact, tolerance):
    assert float((ours.double() - exact).abs().max()) <= tolerance * float(exact.abs().max())


def drawn(*shape, dtype, seed=0, columns=0):
    """Random numbers; as some columns of a wider matrix if asked."""
    wide = torch.randn(*shape[:-1], shape[-1] + columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
        dtype
    )
    return wide[..., columns // 2 : columns // 2 + shape[-1]]


@pytest.mark.parametrize(("dtype", "tolerance"), KINDS)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm_and_its_gradient(backend, dtype, tolerance, offset):
    x, weight, dy = (
        drawn(37, 19, dtype=dtype, columns=6),
        drawn(19, dtype=dtype, seed=1),
        drawn(37, 19, dtype=dtype, seed=2, columns=4),
    )
    leaf = x.double().clone().requires_grad_()
    exact = leaf / (leaf.square().mean(1, keepdim=True) + 1e-5).sqrt() * (offset + weight.double())
    norm = Norm(weight, offset, 1e-5)
    y, rstd = backend.rms_norm(x, norm)
    close(y, exact.detach(), tolerance)
    close(backend.rms_norm_backward(dy, x, norm, rstd), torch.autograd.grad(exact, leaf, dy.double())[0], 4 * tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), KINDS)
def test_norms_of_heads_in_place_are_those_of_a_copy(dtype, tolerance, monkeypatch):
    """As accelerators take them: columns of a matrix, of which the gradient is asked, too."""
    monkeypatch.setattr(cpu, "load_library", lambda: None)
    results = []
    for rows in (lambda x: x.unflatten(1, (-1, 6)), lambda x: x.reshape(-1, 6)):
        x, weight, dy = drawn(11, 18, dtype=dtype, columns=4), drawn(6, dtype=dtype, seed=1), drawn(11, 18, dtype=dtype, seed=2)
        x.requires_grad_(), weight.requires_grad_()
        y = operations.rms_norm(rows(x), Norm(weight, 1.0, 1e-5)).view(11, 18)
        results.append([y.detach(), *torch.autograd.grad(y, (x, weight), dy)])
    for ours, exact in zip(*results, strict=True):
        close(ours, exact.double(), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), KINDS)
@pytest.mark.parametrize(("kind", "act"), [("silu", F.silu), ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh"))])
def test_gates_and_their_gradients(backend, dtype, tolerance, kind, act):
    both = 4 * drawn(23, 34, dtype=dtype)
    g, u = both.chunk(2, dim=1)
    g[0, :4] = torch.tensor([-200.0, 200.0, 0.0, -87.5], dtype=dtype)
    dh = drawn(23, 17, dtype=dtype, seed=1)
    leaves = [t.double().clone().requires_grad_() for t in (g, u)]
    exact = act(leaves[0]) * leaves[1]
    gradients = torch.autograd.grad(exact, leaves, dh.double())
    close(backend.gate(g, u, kind), exact.detach(), tolerance)
    dg, du, h = backend.gate_backward_(dh.clone(), g, u, kind)
    for ours, reference in ((dg, gradients[0]), (du, gradients[1]), (h, exact.detach())):
        close(ours, reference, tolerance)
    assert torch.equal(operations.join_columns([dg, du]), torch.cat([dg, du], dim=1))
    assert operations.join_columns([dg, du]).data_ptr() == dg.data_ptr()


def test_scratch_results_take_each_others_memory_and_no_others_do():
    if cpu.load_library() is None:
        pytest.skip("no compiler here")
    x, weight = drawn(9, 16, dtype=torch.float32), torch.ones(16)
    first, kept = cpu.gate(x, x, "silu"), drawn(40, 16, dtype=torch.float32, seed=1)
    before = first.clone()
    addresses = {cpu.rms_norm(kept, Norm(weight, 0.0, 1e-5), scratch=True)[0].data_ptr() for _ in range(3)}
    smaller = cpu.gate(x, x, "silu", scratch=True)
    assert addresses == {smaller.data_ptr()}
    assert first.data_ptr() not in addresses
    assert torch.equal(smaller, before)
    assert torch.equal(first, before)
    assert cpu.gate(x.double(), x.double(), "silu", scratch=True).data_ptr() not in addresses
    with ThreadPoolExecutor() as pool:
        assert pool.submit(lambda: cpu.gate(x, x, "silu", scratch=True).data_ptr()).result() not in addresses


@pytest.mark.parametrize(("dtype", "tolerance"), KINDS)
def test_a_softmax_swept_in_tiles(backend, dtype, tolerance):
    logits = 30 * drawn(9, 50, dtype=dtype)
    top, total = torch.full((9,), torch.finfo(dtype).min, dtype=dtype), torch.zeros(9, dtype=dtype)
    weighed = torch.zeros(9, dtype=dtype)
    for tile in logits.split(7, dim=1):
        part = tile.clone()
        rescale = backend.softmax_tile_(part, top, total)
        weighed = weighed * rescale + part @ torch.arange(part.shape[1], dtype=dtype)
    close(top + total.log(), logits.double().logsumexp(1), tolerance)
    numbers = torch.cat([torch.arange(tile.shape[1]) for tile in logits.split(7, dim=1)]).double()
    close(weighed / total, logits.double().softmax(1) @ numbers, 10 * tolerance)


def test_a_long_sum_is_not_rounded_at_every_number(backend):
    """One probable token and 50,000 improbable ones, in float32: summed one by one, each would be rounded away or up."""
    logits = 3 * drawn(40, 50_000, dtype=torch.float32)
    logits[:, 7] = 14.0
    top, total = torch.full((40,), torch.finfo(torch.float32).min), torch.zeros(40)
    backend.softmax_tile_(logits.clone(), top, total)
    close(top + total.log(), logits.double().logsumexp(1), 2e-7)


def test_what_is_not_a_number_stays_so(backend):
    nan, x = torch.full((2, 8), float("nan")), torch.ones(2, 8)
    assert backend.gate(nan, x, "silu").isnan().all()
    assert backend.gate(nan, x, "gelu_tanh").isnan().all()
    assert backend.rms_norm(nan, Norm(x[0], 0.0, 1e-5))[0].isnan().all()
    top, total = torch.zeros(2), torch.zeros(2)
    backend.softmax_tile_(nan.clone(), top, total)
    assert total.isnan().all()


def test_columns_side_by_side_are_joined_without_a_copy_and_others_with_one():
    wide = torch.randn(5, 9)
    a, b, c = wide.split([2, 3, 4], dim=1)
    assert operations.join_columns([a, b, c]).data_ptr() == wide.data_ptr()
    for parts in ([a, c], [b, a, c], [a.contiguous(), b, c], [torch.randn(5, 3), b], [wide[:, :2], wide[:, 2:4]]):
        assert torch.equal(operations.join_columns(parts), torch.cat(parts, dim=1))
    assert torch.equal(operations.join_columns([torch.ones(3, 2).T, torch.ones(2, 2)]), torch.ones(2, 5))


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("tokens", [5, 40])
@pytest.mark.parametrize("adapted", [(True, True), (False, True), (False, False)])
def test_gradients_are_slopes(backend, normed, tokens, adapted):
    """By finite differences, in float64: with fewer tokens than inputs and with more."""
    norm = Norm(drawn(6, dtype=torch.float64, seed=9), 1.0, 1e-5) if normed else None
    x = drawn(tokens, 6, dtype=torch.float64).clone().requires_grad_()
    factors = [drawn(2, 6, dtype=torch.float64, seed=3), drawn(4, 2, dtype=torch.float64, seed=4)] * 2
    factors = [f.clone().requires_grad_() for f in factors]
    weights = [drawn(4, 6, dtype=torch.float64, seed=n) for n in (5, 6)]
    down = operations.Linear(drawn(6, 4, dtype=torch.float64, seed=7), drawn(6, dtype=torch.float64, seed=8))

    def run(x, A, B, C, D):
        pairs = [(A, B) if adapted[0] else (None, None), (C, D) if adapted[1] else (None, None)]
        layers = [
            operations.Linear(w, drawn(4, dtype=torch.float64, seed=1), *pair) for w, pair in zip(weights, pairs, strict=True)
        ]
        again, g, u = operations.linears(x, norm, layers, [4, 4])
        adapted_down = down._replace(A=B.T if adapted[0] else None, B=A.T if adapted[0] else None)
        return operations.linear_add(again, g, adapted_down, 0.5, (u, "silu"))

    assert torch.autograd.gradcheck(run, (x, *factors), fast_mode=True)


@pytest.mark.parametrize("module", [cpu, torch_backend])
def test_a_back_end_has_the_functions_of_the_interface(module):
    for name, function in vars(Backend).items():
        if inspect.isfunction(function) and not name.startswith("_"):
            wanted = [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()][1:]  # without self
            assert [(p.name, p.kind, p.default) for p in inspect.signature(getattr(module, name)).parameters.values()] == wanted


def test_what_the_cpus_back_end_does_not_support_torch_computes():
    if cpu.load_library() is None:
        pytest.skip("no C compiler here")
    x = torch.ones(4, 8)
    assert backend_for(x, None, x) is cpu
    assert backend_for(x.to("meta")) is torch_backend  # a device without a back end of its own
    for others in ([x.bfloat16()], [x, x.double()], [x, x.to("meta")], [x, x.T], [x[:, :1].expand(4, 8)]):
        assert backend_for(*others) is torch_backend


def test_an_environment_variable_chooses_torch(monkeypatch):
    monkeypatch.setenv("TRIMTAB_KERNELS", "torch")
    assert backends._load.__wrapped__("cpu") is torch_backend
    monkeypatch.delenv("TRIMTAB_KERNELS")
    assert backends._load.__wrapped__("cpu") is cpu
