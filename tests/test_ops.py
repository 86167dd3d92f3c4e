"""The operations by hand: compiled against torch, and both against the plain formula."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from trimtab.engine.fused import kernels, ops

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
def test_rms_norm_and_its_gradient(way, dtype, tolerance, offset):
    x, weight, dy = (
        drawn(37, 19, dtype=dtype, columns=6),
        drawn(19, dtype=dtype, seed=1),
        drawn(37, 19, dtype=dtype, seed=2, columns=4),
    )
    leaf = x.double().clone().requires_grad_()
    exact = leaf / (leaf.square().mean(1, keepdim=True) + 1e-5).sqrt() * (offset + weight.double())
    y, rstd = kernels.rms_norm(x, weight, offset, 1e-5)
    close(y, exact.detach(), tolerance)
    close(
        kernels.rms_norm_backward(dy, x, weight, rstd, offset), torch.autograd.grad(exact, leaf, dy.double())[0], 4 * tolerance
    )


@pytest.mark.parametrize(("dtype", "tolerance"), KINDS)
@pytest.mark.parametrize(("kind", "act"), [("silu", F.silu), ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh"))])
def test_gates_and_their_gradients(way, dtype, tolerance, kind, act):
    both = 4 * drawn(23, 34, dtype=dtype)
    g, u = both.chunk(2, dim=1)
    g[0, :4] = torch.tensor([-200.0, 200.0, 0.0, -87.5], dtype=dtype)
    dh = drawn(23, 17, dtype=dtype, seed=1)
    leaves = [t.double().clone().requires_grad_() for t in (g, u)]
    exact = act(leaves[0]) * leaves[1]
    gradients = torch.autograd.grad(exact, leaves, dh.double())
    close(kernels.gated(g, u, kind), exact.detach(), tolerance)
    dg, du, h = kernels.gated_backward(dh.clone(), g, u, kind)
    for ours, reference in ((dg, gradients[0]), (du, gradients[1]), (h, exact.detach())):
        close(ours, reference, tolerance)
    assert torch.equal(ops.joined([dg, du]), torch.cat([dg, du], dim=1))
    assert ops.joined([dg, du]).data_ptr() == dg.data_ptr()


def test_transient_results_take_each_others_memory_and_no_others_do():
    if kernels._library() is None:
        pytest.skip("no compiler here")
    x, weight = drawn(9, 16, dtype=torch.float32), torch.ones(16)
    first, kept = kernels.gated(x, x, "silu"), drawn(40, 16, dtype=torch.float32, seed=1)
    before = first.clone()
    addresses = {kernels.rms_norm(kept, weight, 0.0, 1e-5, transient=True)[0].data_ptr() for _ in range(3)}
    smaller = kernels.gated(x, x, "silu", transient=True)
    assert addresses == {smaller.data_ptr()}
    assert first.data_ptr() not in addresses
    assert torch.equal(smaller, before)
    assert torch.equal(first, before)
    assert kernels.gated(x.double(), x.double(), "silu", transient=True).data_ptr() not in addresses
    with ThreadPoolExecutor() as pool:
        assert pool.submit(lambda: kernels.gated(x, x, "silu", transient=True).data_ptr()).result() not in addresses


@pytest.mark.parametrize(("dtype", "tolerance"), KINDS)
def test_a_softmax_swept_in_tiles(way, dtype, tolerance):
    logits = 30 * drawn(9, 50, dtype=dtype)
    top, total = torch.full((9,), torch.finfo(dtype).min, dtype=dtype), torch.zeros(9, dtype=dtype)
    weighed = torch.zeros(9, dtype=dtype)
    for tile in logits.split(7, dim=1):
        part = tile.clone()
        fade = kernels.sweep_(part, top, total)
        weighed = weighed * fade + part @ torch.arange(part.shape[1], dtype=dtype)
    close(top + total.log(), logits.double().logsumexp(1), tolerance)
    numbers = torch.cat([torch.arange(tile.shape[1]) for tile in logits.split(7, dim=1)]).double()
    close(weighed / total, logits.double().softmax(1) @ numbers, 10 * tolerance)


def test_a_long_sum_is_not_rounded_at_every_number(way):
    """One probable token and 50,000 improbable ones, in float32: summed one by one, each would be rounded away or up."""
    logits = 3 * drawn(40, 50_000, dtype=torch.float32)
    logits[:, 7] = 14.0
    top, total = torch.full((40,), torch.finfo(torch.float32).min), torch.zeros(40)
    kernels.sweep_(logits.clone(), top, total)
    close(top + total.log(), logits.double().logsumexp(1), 2e-7)


def test_what_is_not_a_number_stays_so(way):
    nan, x = torch.full((2, 8), float("nan")), torch.ones(2, 8)
    assert kernels.gated(nan, x, "silu").isnan().all()
    assert kernels.gated(nan, x, "gelu_tanh").isnan().all()
    assert kernels.rms_norm(nan, x[0], 0.0, 1e-5)[0].isnan().all()
    top, total = torch.zeros(2), torch.zeros(2)
    kernels.sweep_(nan.clone(), top, total)
    assert total.isnan().all()


def test_columns_side_by_side_are_joined_without_a_copy_and_others_with_one():
    wide = torch.randn(5, 9)
    a, b, c = wide.split([2, 3, 4], dim=1)
    assert ops.joined([a, b, c]).data_ptr() == wide.data_ptr()
    for parts in ([a, c], [b, a, c], [a.contiguous(), b, c], [torch.randn(5, 3), b], [wide[:, :2], wide[:, 2:4]]):
        assert torch.equal(ops.joined(parts), torch.cat(parts, dim=1))
    assert torch.equal(ops.joined([torch.ones(3, 2).T, torch.ones(2, 2)]), torch.ones(2, 5))


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("tokens", [5, 40])
@pytest.mark.parametrize("adapted", [(True, True), (False, True), (False, False)])
def test_gradients_are_slopes(way, normed, tokens, adapted):
    """By finite differences, in float64: with fewer tokens than inputs and with more."""
    how = ops.Norm(drawn(6, dtype=torch.float64, seed=9), 1.0, 1e-5) if normed else None
    x = drawn(tokens, 6, dtype=torch.float64).clone().requires_grad_()
    factors = [drawn(2, 6, dtype=torch.float64, seed=3), drawn(4, 2, dtype=torch.float64, seed=4)] * 2
    factors = [f.clone().requires_grad_() for f in factors]
    weights = [drawn(4, 6, dtype=torch.float64, seed=n) for n in (5, 6)]
    down = ops.Site(drawn(6, 4, dtype=torch.float64, seed=7), drawn(6, dtype=torch.float64, seed=8))

    def run(x, A, B, C, D):
        pairs = [(A, B) if adapted[0] else (None, None), (C, D) if adapted[1] else (None, None)]
        sites = [ops.Site(w, drawn(4, dtype=torch.float64, seed=1), *pair) for w, pair in zip(weights, pairs, strict=True)]
        again, g, u = ops.linears(x, how, sites, [4, 4])
        return ops.gated_linear_add(
            again, g, u, "silu", down._replace(A=B.T if adapted[0] else None, B=A.T if adapted[0] else None), 0.5
        )

    assert torch.autograd.gradcheck(run, (x, *factors), fast_mode=True)
