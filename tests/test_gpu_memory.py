"""Memory on a GPU: what a plan says a pack takes is what it takes, whatever is computed again, on quantized matrices, too."""

import pytest
import torch
import transformers
from families import perturb, random_rows

from trimtab.base import Base
from trimtab.data import TokenRow, pack_flat
from trimtab.engine import Workload, pack_logprobs, plan_memory
from trimtab.engine.memory_plan import measure_for
from trimtab.methods import attach
from trimtab.methods.lora import LoRA

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
DEVICE = torch.device("cuda", 0)
VOCABULARY = 32_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama of four layers of 1,024, large enough that the allocator's rounding is small beside it."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=16, num_key_value_heads=4
    )  # fmt: skip
    place = tmp_path_factory.mktemp("model")
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(place)
    return place


def adapted(folder, quantize="none", dtype=torch.bfloat16):
    if quantize != "none":
        pytest.importorskip("bitsandbytes")
    base = Base.load_folder(folder, dtype, DEVICE, quantize=quantize, with_tokenizer=False)
    adapter = attach(base.model, LoRA(rank=8))
    perturb(adapter.parameters(), 0.01)
    return base, adapter


def pack_of(*lengths):
    return pack_flat(
        TokenRow(ids, list(range(1, len(ids))), f"row:{n}") for n, ids in enumerate(random_rows(*(n + 1 for n in lengths)))
    )


@pytest.mark.parametrize("recompute", ["none", "mlp", "full"])
@pytest.mark.parametrize("lengths", [[500] * 32, [8192]], ids=["rows", "a long row"])
def test_a_pack_takes_what_smaller_ones_say(lengths, recompute, folder):
    base, _ = adapted(folder)
    pack, measure = pack_of(*lengths), measure_for(base.model)
    planned = measure.profile(max(lengths), 1.0, recompute=recompute).peak_bytes(len(pack.ids), sum(pack.pairs))
    assert measure.confirm(pack, recompute) == pytest.approx(planned, rel=0.08)


def test_less_is_held_if_more_is_computed_again(folder):
    base, _ = adapted(folder)
    measure, pack = measure_for(base.model), pack_of(8192)
    none, mlp, full = (measure.confirm(pack, level) for level in ("none", "mlp", "full"))
    assert full < 0.9 * mlp
    assert mlp < 0.9 * none


def test_a_plan_is_within_its_share_and_smaller_with_less_memory(folder):
    base, _ = adapted(folder)
    made = plan_memory(base.model, Workload(500), "auto", "auto", 0.0)
    assert made.pack_tokens == 32768
    assert made.peak_bytes < 0.92 * torch.cuda.mem_get_info(DEVICE)[0]
    less = plan_memory(base.model, Workload(500), "auto", "auto", 0.0, 0.3 * made.peak_bytes)
    assert 2048 <= less.pack_tokens < 32768


def test_recomputed_mlps_give_the_same_bits(folder):
    base, adapter = adapted(folder)
    pack, found = pack_of(300, 500).to(DEVICE), []
    for level in ("none", "mlp"):
        logprobs = pack_logprobs(base.model, pack, recompute=level)
        found.append([logprobs.detach(), *torch.autograd.grad(logprobs.sum(), list(adapter.parameters().values()))])
    near = [float((a - b).norm() / a.norm().clamp_min(1e-20)) for a, b in zip(*found, strict=True)]
    assert max(near) < 1e-5  # flash attention adds gradients in any order


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_layers_over_quantized_matrices_are_those_of_the_dequantized_ones(kind, folder):
    """And no more than one matrix is dense at a time."""
    base, adapter = adapted(folder, kind)
    pack, found, state = pack_of(300, 500).to(DEVICE), [], adapter.state()
    logprobs = pack_logprobs(base.model, pack)
    found.append([logprobs.detach(), *torch.autograd.grad(logprobs.sum(), list(adapter.parameters().values()))])
    most = measure_for(base.model).confirm(pack, "full")
    plain, other = adapted(folder)
    for path, module in base.model.named_modules():
        if type(module).__module__.startswith("bitsandbytes"):
            identity = torch.eye(module.in_features, dtype=torch.bfloat16, device=DEVICE)
            plain.model.get_submodule(path).weight.data = module(identity).T.contiguous()
    other.load_state(state)
    logprobs = pack_logprobs(plain.model, pack)
    found.append([logprobs.detach(), *torch.autograd.grad(logprobs.sum(), list(other.parameters().values()))])
    assert max(float((a - b).norm() / b.norm()) for a, b in zip(*found, strict=True)) < 2e-2
    one = 2816 * 1024 * 4  # in float32, as int8 is dequantized
    assert most - measure_for(plain.model).confirm(pack, "full") < 2.5 * one
