"""A merged model is a plain Transformers folder with the adapter's logits."""

import pytest
import torch
import transformers
from families import FAMILIES, perturb, random_rows, tiny

from trimtab.base import Base
from trimtab.base.fingerprint import own_weights, weights_hash
from trimtab.core.errors import ArtifactError, NotMergeable, StorageError
from trimtab.deploy import merge
from trimtab.methods import AdapterLayer, attach
from trimtab.methods.lora import LoRA

IDS = torch.tensor(random_rows(11, 11))


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def adapted(family, dtype=torch.float32):
    base = Base(tiny(family, dtype))
    adapter = attach(base.model, LoRA(rank=4))
    perturb(adapter.parameters())
    return base, adapter


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_alone_loads_it_with_equal_logits(family, tmp_path):
    base, adapter = adapted(family)
    before, digest = logits(base.model), weights_hash(own_weights(base.model))
    done = merge(base, adapter, tmp_path / "merged")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert not any(isinstance(m, AdapterLayer) for m in plain.modules())
    assert {p.dtype for p in plain.parameters()} == {torch.float32}
    torch.testing.assert_close(logits(plain), before, rtol=1e-4, atol=1e-4)
    assert (before - logits(tiny(family))).abs().max() > 1e-2
    assert torch.equal(logits(base.model), before)  # and the base and its adapter are as they were
    assert weights_hash(own_weights(base.model)) == digest
    assert done.max_logit_difference < 1e-4 * max(done.logit_scale, 1)
    assert done.same_top_token == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_embeddings_stay_tied(dtype, tmp_path):
    base, adapter = adapted("llama-tied", dtype)
    merge(base, adapter, tmp_path / "merged")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert sum(f.stat().st_size for f in (tmp_path / "merged").glob("*.safetensors")) < 1.1 * 4 * plain.num_parameters()


def test_a_bfloat16_base_is_merged_in_float32(tmp_path):
    """In bfloat16 a small change would be rounded away; what is saved is base + change, unrounded."""
    base, adapter = adapted("llama", torch.bfloat16)
    merge(base, adapter, tmp_path / "merged")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    path = "model.layers.0.self_attn.q_proj"
    layer = adapter.layers[path]
    expected = layer.base.weight.double() + layer.scale * layer.B.double() @ layer.A.double()
    torch.testing.assert_close(plain.get_submodule(path).weight.double(), expected, rtol=1e-6, atol=1e-6)
    assert plain.config.dtype == torch.float32


def test_values_that_are_not_finite_are_refused_and_nothing_is_written(tmp_path):
    base, adapter = adapted("llama")
    next(iter(adapter.parameters().values())).data[0] = float("nan")
    with pytest.raises(ArtifactError, match="NaN or Inf, so nothing was merged"):
        merge(base, adapter, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_a_method_that_is_no_change_of_weights_is_refused_and_nothing_is_written(tmp_path, monkeypatch):
    base, adapter = adapted("llama")
    monkeypatch.setattr(LoRA, "mergeable", False)
    monkeypatch.setattr(type(next(iter(adapter.layers.values()))), "merge", AdapterLayer.merge)
    with pytest.raises(NotMergeable, match="is not a change of weights"):
        merge(base, adapter, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_never_overwritten(tmp_path):
    base, adapter = adapted("llama")
    (tmp_path / "merged").mkdir()
    with pytest.raises(StorageError, match="exists already"):
        merge(base, adapter, tmp_path / "merged")
    assert [p.name for p in tmp_path.iterdir()] == ["merged"]


@pytest.mark.parametrize("wrong", [0.5, 0.0])
def test_a_merge_that_is_not_the_adapter_is_not_kept(wrong, tmp_path, monkeypatch):
    """The negative control of the check: a merge with the wrong scale, and one that forgets the adapter."""
    base, adapter = adapted("llama")
    kind = type(next(iter(adapter.layers.values())))
    original = kind.merge

    def merge_wrongly(self):
        scale, self.scale = self.scale, self.scale * wrong
        try:
            return original(self)
        finally:
            self.scale = scale

    monkeypatch.setattr(kind, "merge", merge_wrongly)
    with pytest.raises(ArtifactError, match="so it was not kept"):
        merge(base, adapter, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []
