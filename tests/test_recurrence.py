"""The gated linear recurrence over a tree of segments, against its definition token by token in float64, and Transformers' functions."""

import pytest
import torch
from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention
from transformers.models.nemotron_h.modeling_nemotron_h import mamba2_chunk_scan
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

from trimtab.data.prefix_tree import Segment
from trimtab.engine import recurrence
from trimtab.engine.backends import Recurrence, backend_for
from trimtab.engine.backends import torch as reference

SEGMENTS = (Segment(0, 70, -1), Segment(70, 90, 0), Segment(90, 130, 0), Segment(130, 133, -1), Segment(133, 140, 1))
TOKENS, GROUPS, HEADS = 140, 2, 4


def inputs(dtype, keys, values, by_channel, delta):
    draw = torch.Generator().manual_seed(0)

    def numbers(*shape):
        return torch.randn(TOKENS, *shape, generator=draw, dtype=torch.float64)

    k = numbers(GROUPS, keys)
    decay = -torch.nn.functional.softplus(numbers(HEADS, keys) if by_channel else numbers(HEADS))
    tensors = [numbers(GROUPS, keys), k / k.norm(dim=-1, keepdim=True), numbers(HEADS, values), decay]
    tensors.append(numbers(HEADS).sigmoid() if delta else None)
    return [None if t is None else t.to(dtype).requires_grad_() for t in tensors]


def by_definition(q, k, v, g, beta):
    q, k = (t.repeat_interleave(HEADS // GROUPS, dim=1) for t in (q, k))
    outs, ends = [None] * TOKENS, []
    for start, end, parent in SEGMENTS:
        state = v.new_zeros(HEADS, q.shape[2], v.shape[2]) if parent < 0 else ends[parent]
        for t in range(start, end):
            state = state * (g[t].exp()[:, None, None] if g.ndim == 2 else g[t].exp()[:, :, None])
            written = v[t] if beta is None else beta[t][:, None] * (v[t] - torch.einsum("hkv,hk->hv", state, k[t]))
            state = state + torch.einsum("hk,hv->hkv", k[t], written)
            outs[t] = torch.einsum("hkv,hk->hv", state, q[t])
        ends.append(state)
    return torch.stack(outs), torch.stack(ends)


def relative(ours, expected):
    return float((ours.detach().double() - expected.detach()).abs().max() / expected.detach().abs().max())


@pytest.mark.parametrize("of_reference", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("keys", "values", "by_channel", "delta"), [(16, 32, False, True), (8, 16, True, True), (16, 32, False, False)]
)
def test_outputs_states_and_gradients_are_those_of_the_definition(dtype, keys, values, by_channel, delta, of_reference):
    given = inputs(dtype, keys, values, by_channel, delta)
    exact = [None if t is None else t.detach().double().requires_grad_() for t in given]
    backend = reference if of_reference else backend_for(*(t for t in given if t is not None))
    if not of_reference and not backend.supports_recurrence(Recurrence(*given)):
        pytest.skip("there is no compiler")
    out, ends = recurrence._GatedRecurrence.apply(SEGMENTS, backend, *given)
    expected, expected_ends = by_definition(*exact)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    assert relative(out, expected) < tolerance
    assert relative(ends, expected_ends) < tolerance
    weights = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).view(expected.shape)
    ours = torch.autograd.grad((out.double() * weights).sum(), [t for t in given if t is not None])
    theirs = torch.autograd.grad((expected * weights).sum(), [t for t in exact if t is not None])
    assert max(map(relative, ours, theirs)) < 5 * tolerance


@pytest.mark.parametrize(
    ("function", "by_channel"),
    [(torch_chunk_gated_delta_rule, False), (chunk_kimi_delta_attention, True), (mamba2_chunk_scan, False)],
)
def test_transformers_functions_are_recognized(function, by_channel):
    kind = recurrence._kind(function)
    assert recurrence._is_right(function, kind, by_channel)


def test_a_function_of_the_same_parameters_that_computes_something_else_is_left_alone():
    """The negative control: the names of its parameters are those of the delta rule."""

    def another(
        query, key, value, g, beta, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False, **options
    ):
        out, state = torch_chunk_gated_delta_rule(
            query, key, value, g=g, beta=beta, initial_state=initial_state, output_final_state=True,
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        )  # fmt: skip
        return out + 0.01 * value, state

    assert not recurrence._is_right(another, recurrence._kind(another), False)
    draw = torch.Generator().manual_seed(0)
    arguments = {name: torch.randn(1, 7, 2, 32, generator=draw) for name in ("query", "key", "value")}
    arguments |= {"g": -torch.rand(1, 7, 2, generator=draw), "beta": torch.rand(1, 7, 2, generator=draw)}
    assert recurrence.branching_scan(another, arguments, (Segment(0, 7, -1),)) is None
    assert recurrence.branching_scan(torch_chunk_gated_delta_rule, arguments, (Segment(0, 7, -1),)) is not None
