"""Layers by hand on bases of 16 bits: nearer to float64 than Transformers' own code, and float32 wherever small numbers would vanish."""

import copy
from contextlib import nullcontext

import pytest
import torch
import transformers
from families import _COMMON, exact_norms, method_of, perturb, random_rows
from kinds import kind

from trimtab.base import Base
from trimtab.base.quantized import computing_in
from trimtab.core.errors import UnsupportedModel
from trimtab.data import TokenRow, pack_tree
from trimtab.engine import check_packing, forward, low_rank, operations, own_passes
from trimtab.engine.backends import Norm, cuda
from trimtab.engine.backends import torch as torch_backend
from trimtab.engine.forward import describe_layers, states_at
from trimtab.engine.layouts import PackLayout
from trimtab.engine.patching import unfused
from trimtab.methods import LowRankUpdate, Method, Sample, adapters, attach
from trimtab.methods.lora import LoRA

HALF = [torch.bfloat16, torch.float16]
SIZES = {**_COMMON, "hidden_size": 64, "intermediate_size": 96}
FAMILIES = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, head_dim=16)),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(
            **SIZES, head_dim=16, sliding_window=9, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=8
        )
    ),
    "glm4": lambda: transformers.Glm4ForCausalLM(  # half of each head is rotated; norms before and after
        transformers.Glm4Config(**SIZES, head_dim=16, partial_rotary_factor=0.5)
    ),
}


def rows():
    head, *rest = random_rows(12, 33, 40, 27, 39, seed=4)
    return [
        TokenRow(ids, list(range(1, len(ids))), f"row:{n}")
        for n, ids in enumerate([head + rest[0], head + rest[1], rest[2], rest[3]])
    ]


PACK = pack_tree(rows())


def drawn(family):
    torch.manual_seed(0)
    model = FAMILIES[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def made(family, dtype, method):
    """A model with an adapter off its first values."""
    model = drawn(family).eval().requires_grad_(False).to(dtype)
    adapter = attach(model, method, sample=Sample(random_rows(30, seed=3)))
    perturb(adapter.parameters(), 0.02)
    return model, adapter


def computed(model, way=nullcontext):
    """Hidden states, and the gradients of an adapter's parameters, in float64."""
    (adapter,) = adapters(model).values()
    with way():
        hidden = states_at(model, PACK, torch.arange(len(PACK.ids)))
    draw = torch.Generator().manual_seed(7)
    direction = torch.randn(hidden.shape, generator=draw, dtype=torch.float64).to(hidden.dtype)
    gradients = torch.autograd.grad(hidden, list(adapter.parameters().values()), direction, allow_unused=True)
    return hidden.detach().double(), [g.double() for g in gradients if g is not None]


def distances(found, exact):
    """Of outputs and of gradients, relative: each row and each parameter counts alike."""
    outputs = ((found[0] - exact[0]).norm(dim=1) / exact[0].norm(dim=1)).square().mean().sqrt()
    each = [
        ((one - other).norm() / other.norm().clamp_min(1e-30)).square() for one, other in zip(found[1], exact[1], strict=True)
    ]
    return float(outputs), float(torch.stack(each).mean().sqrt())


def ratios(model, monkeypatch):
    """By hand's distances from float64, as shares of those of the model's own code."""
    exact_norms(monkeypatch)
    exact = computed(copy.deepcopy(model).double(), unfused)
    monkeypatch.undo()
    own, ours = computed(model, unfused), computed(model)
    return [a / b for a, b in zip(distances(ours, exact), distances(own, exact), strict=True)]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_by_hand_is_no_farther_from_float64_than_its_own_code(family, dtype, monkeypatch):
    model, _ = made(family, dtype, LoRA(rank=4, alpha=8.0))
    (how,) = describe_layers(model)
    assert "self_attn, mlp by hand" in how
    assert max(ratios(model, monkeypatch)) <= 1.1


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_neither_is_a_quantized_one(kind, tmp_path):
    """From what its dequantized weights give in float32: by hand or not, they are rounded to 16 bits first."""
    pytest.importorskip("bitsandbytes")
    drawn("qwen2").save_pretrained(tmp_path)
    model = Base.load_folder(tmp_path, torch.bfloat16, torch.device("cpu"), quantize=kind, with_tokenizer=False).model
    perturb(attach(model, LoRA(rank=4)).parameters(), 0.02)
    (how,) = describe_layers(model)
    assert "self_attn, mlp by hand" in how
    wide = copy.deepcopy(model)
    for tensor in (*wide.parameters(), *wide.buffers()):
        tensor.data = tensor.data.float() if tensor.dtype == torch.bfloat16 else tensor.data
    with computing_in(wide, torch.float32):
        exact = computed(wide, unfused)
    own, ours = computed(model, unfused), computed(model)
    assert max(a / b for a, b in zip(distances(ours, exact), distances(own, exact), strict=True)) <= 1.1


@pytest.mark.parametrize("name", [name for name in Method.names() if name not in ("lora", "tokens")])
def test_so_is_every_other_method(name, monkeypatch):
    model, _ = made("qwen3", torch.bfloat16, method_of(name))
    assert max(ratios(model, monkeypatch)) <= 1.1


def coarse(g, u, activation, scratch=False, _real=torch_backend.gate):
    """A gate with seven bits less than float16."""
    h = _real(g, u, activation)
    return h.to(torch.float8_e4m3fn).half() if h.dtype == torch.float16 else h


def test_what_is_rounded_more_is_noticed_and_is_not_used_where_it_is_noticed_in_time(monkeypatch):
    """Negative controls."""
    model, _ = made("llama", torch.float16, LoRA(rank=4))
    other, _ = made("llama", torch.float16, LoRA(rank=4))
    describe_layers(model)
    monkeypatch.setattr(torch_backend, "gate", coarse)
    with unfused():
        (how,) = describe_layers(other)
    assert "in float16, by hand it is farther from float32 than its own code" in how
    monkeypatch.undo()
    exact_norms(monkeypatch)
    exact = computed(copy.deepcopy(model).double(), unfused)
    monkeypatch.undo()
    own = distances(computed(model, unfused), exact)
    monkeypatch.setattr(torch_backend, "gate", coarse)
    assert distances(computed(model), exact)[0] > 1.1 * own[0]


def a_matrix(dtype, tokens=1024):
    """A matrix with large weights and an adapter with small ones, and its inputs."""
    draw = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 48, generator=draw).to(dtype) for n in (tokens, 48))
    layer = LoRA(rank=8, alpha=16.0).layer(torch.nn.Linear(48, 48, bias=False, dtype=dtype).requires_grad_(False), "")
    with torch.no_grad():
        layer.base.weight.copy_(0.1 * weight)
        layer.B.copy_(1e-4 * torch.randn(layer.B.shape, generator=draw))
    return x, layer


def change_of(y, x, weight):
    """The change of the matrix that explains the outputs best: so many tokens average the rounding of each."""
    return torch.linalg.lstsq(x.double(), y.detach().double() - x.double() @ weight.double().T).solution.T


def by_hand(x, layer):
    update = layer.low_rank_factors()
    return operations.linear_add(None, x, operations.Linear(layer.base.weight, None, update.A, update.B), 1.0)


def merged(x, layer):
    return x @ (layer.base.weight.float() + layer.change()).to(x.dtype).T


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_small_change_acts_as_well_as_in_the_modules_code_and_not_so_in_a_merged_matrix(dtype):
    x, layer = a_matrix(dtype)
    exact = layer.change().double()

    def off(compute):
        return float((change_of(compute(x, layer), x, layer.base.weight) - exact).norm() / exact.norm())

    own = off(lambda x, layer: layer.adapt(x))
    assert off(by_hand) <= 1.1 * own
    assert off(merged) > 1.1 * own


def gradients_in_float32(dtype):
    """Whether the gradients of A and B are the products of what the backward pass has in 16 bits, not rounded."""
    x, layer = a_matrix(dtype)
    x.requires_grad_()
    dy = torch.randn(len(x), 48, generator=torch.Generator().manual_seed(1)).to(dtype)
    update = layer.low_rank_factors()
    dx, dA, dB = torch.autograd.grad(by_hand(x, layer), [x, layer.A, layer.B], dy)
    x, update = x.detach(), LowRankUpdate(update.A.detach(), update.B.detach())
    assert (dx.dtype, dA.dtype, dB.dtype) == (dtype, torch.float32, torch.float32)
    through_B, through_A = dy @ update.B.to(dtype), x @ update.A.to(dtype).T
    found = (dA, through_B.double().T @ x.double()), (dB, layer.scale * dy.double().T @ through_A.double())
    return all(float((ours - exact).norm() / exact.norm()) < 1e-6 for ours, exact in found)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_gradients_of_factors_are_not_rounded(dtype, monkeypatch):
    assert gradients_in_float32(dtype)
    real = low_rank.sums_of_products
    monkeypatch.setattr(low_rank, "sums_of_products", lambda a, b: real(a, b).to(dtype).float())
    assert not gradients_in_float32(dtype)


def gradient_of_a_norm(dtype):
    x = torch.randn(400, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight = torch.nn.Parameter(torch.linspace(0.5, 1.5, 16))
    y = operations.rms_norm(x, Norm(weight, 0.0, 1e-6))
    (dweight,) = torch.autograd.grad(y, weight, torch.ones_like(y))
    assert (y.dtype, dweight.dtype) == (dtype, torch.float32)
    exact = (x.double() * torch.rsqrt(x.double().square().mean(1, keepdim=True) + 1e-6)).sum(0)
    return float((dweight - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_trained_norm_is_rounded_and_its_gradient_is_not(dtype, monkeypatch):
    assert gradient_of_a_norm(dtype) < 1e-5
    monkeypatch.setattr(operations, "at_least_float32", lambda t: t)
    assert gradient_of_a_norm(dtype) > 1e-4


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_product_is_rounded_once_beside_a_bias_a_change_and_a_residual(dtype):
    """Of a large residual stream, rounding twice is what costs most."""
    x, layer = a_matrix(dtype)
    residual = (8 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2))).to(dtype)
    bias = torch.randn(48, generator=torch.Generator().manual_seed(3)).to(dtype)
    A, B = layer.A.to(dtype), (2000 * layer.scale * layer.B).to(dtype)
    linear = operations.Linear(layer.base.weight, bias, A, B)
    plain = (x.double() @ linear.weight.double().T + bias.double()) + x.double() @ A.double().T @ B.double().T
    for given, scale, exact in ((None, 1.0, plain), (residual, 0.5, residual.double() + 0.5 * plain)):
        off = (operations.linear_add(given, x, linear, scale) - exact).norm()
        best = (exact.to(dtype) - exact).norm()
        assert off <= (1.5 if given is None else 1.02) * best
    twice = (residual + 0.5 * (x @ linear.weight.T + bias)) + 0.5 * (x @ A.T @ B.T)
    assert (twice - exact).norm() > 1.1 * best


class Mistaken(PackLayout):
    """Its tokens see a little of all others."""

    share = 0.0

    def attend(self, call):
        out = super().attend(call)
        return out + self.share * out.mean(1, keepdim=True)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_check_of_packing_measures_rounding_and_sees_smaller_mistakes_than_it_had_to_allow(dtype, monkeypatch):
    monkeypatch.setattr(forward, "PackLayout", Mistaken)
    model, _ = made("llama", dtype, LoRA(rank=4))
    with unfused(), torch.no_grad():
        passes = own_passes.OwnPasses(model, random_rows(15, 14, 20))
        check_packing(model)
        held = [p.data_ptr() for p in model.parameters()]
        wide = torch.cat(passes._in_float32)
        exact = torch.cat(
            [
                own_passes._of_tokens(copy.deepcopy(model).float()(torch.tensor([ids])).logits[0, :-1].double(), ids)
                for ids in passes.rows
            ]
        )
        assert float((wide - exact).abs().max()) < 1e-5
        assert float((torch.cat(passes.logprobs) - exact).abs().max()) > 1e-4
        assert held == [p.data_ptr() for p in model.parameters()]
        monkeypatch.setattr(Mistaken, "share", 0.3)
        with pytest.raises(UnsupportedModel, match="cannot be trained on packed examples exactly"):
            check_packing(model)
        monkeypatch.setattr(own_passes.OwnPasses, "_in_float32", None)
        check_packing(model)  # without the measurement, nothing is noticed


def test_a_model_that_overflows_is_refused_by_that_name():
    model, _ = made("llama", torch.float16, LoRA(rank=4))
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.base.weight.fill_(6e4)
    with pytest.raises(
        UnsupportedModel, match=r"gives NaN in float16, in its own forward pass: its numbers overflow.*bfloat16 and float32"
    ):
        check_packing(model)


def test_products_on_cuda_keep_partial_sums_in_float32():
    """Read from the process's settings, which the CUDA back end makes when it is loaded."""
    assert cuda._DTYPES
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    assert not torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction


def test_a_residual_stream_may_be_wider_than_the_head():
    model = kind("state alone", torch.bfloat16)
    assert model.backbone(torch.tensor([[1, 2]])).last_hidden_state.dtype == torch.float32
    check_packing(model)
