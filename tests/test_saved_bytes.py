"""What a layer saves for its backward pass, at the sizes of Qwen2.5-7B and 8,192 tokens, on `meta`: as much as the design counts."""

import pytest
import torch
import transformers
from accelerators import cuda_backend

from trimtab.data import TokenRow, pack_flat
from trimtab.engine.backends import Heads, flash
from trimtab.engine.forward import prepare, states_at
from trimtab.engine.patching import layers_by_hand, layers_of
from trimtab.engine.recompute import recomputing
from trimtab.methods import attach
from trimtab.methods.lora import LoRA

TOKENS = 8192
D, Q, KV, F = 3584, 3584, 512, 18944
"""Hidden size, query and key columns, and the MLP's width."""
SMALL = 1024
"""Bytes a token for factors, their inner products, and norms' and attention's sums."""
REAL = {"hidden_size": D, "intermediate_size": F, "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064}
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50}


def model_of(layers, device, sizes):
    config = transformers.Qwen2Config(**sizes, num_hidden_layers=layers, max_position_embeddings=32768)
    with torch.device(device):
        return transformers.Qwen2ForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def structure():
    """A layer's, learned from a small one, with the sizes of the large one."""
    small = model_of(1, "cpu", TINY)
    prepare(small)
    learned = layers_of(small)[0].forward.learned
    branches = []
    for branch in learned.branches:
        (mixer,) = branch.mixers
        attention = hasattr(mixer.part, "heads")
        real = {"heads": Heads(4, 7, 128), "scale": 128**-0.5} if attention else {"width": F}
        branches.append(branch._replace(mixers=(mixer._replace(part=mixer.part._replace(**real)),)))
    return learned._replace(branches=tuple(branches))


def saved(structure, level, layers):
    """Bytes of all memory that a pass through so many layers keeps, weights aside."""
    model = model_of(layers, "meta", REAL)
    for layer in layers_of(model):
        layer.forward.learned = structure
    attach(model, LoRA(rank=16))
    pack = pack_flat([TokenRow([5] * (TOKENS + 1), list(range(1, TOKENS + 1)), "row")]).to(torch.device("meta"))
    kept, weights = {}, {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with cuda_backend(), recomputing(level), hooks:
        states_at(model, pack, torch.arange(TOKENS, device="meta"))
    assert [count for text, count in layers_by_hand(model).items() if "self_attn, mlp by hand" in text] == [layers]
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in weights)


def of_a_layer(structure, level):
    """Bytes a token."""
    return (saved(structure, level, 3) - saved(structure, level, 1)) / 2 / TOKENS


EXPECTED = {"none": 2 * (2 * D + 2 * Q + 2 * KV + 2 * F), "mlp": 2 * (2 * D + 2 * Q + 2 * KV), "full": 2 * D}


@pytest.mark.parametrize("level", EXPECTED)
def test_a_layer_saves_what_its_frozen_model_would(level, structure):
    assert 0 <= of_a_layer(structure, level) - EXPECTED[level] < (SMALL if level != "full" else 1)


def test_a_tensor_that_keeps_its_neighbours_is_noticed(structure, monkeypatch):
    monkeypatch.setattr(flash, "_alone", lambda t: t)
    assert of_a_layer(structure, "none") == pytest.approx(EXPECTED["none"] + 2 * (Q + KV), abs=SMALL)
