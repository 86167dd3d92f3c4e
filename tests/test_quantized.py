"""A quantized base is its dequantized self: every method that leaves weights alone computes, trains and decodes on it as there."""

import copy
import weakref

import pytest
import torch
import transformers
from families import logprob_alone, method_of, perturb, random_rows, tiny
from worlds import make_model

from trimtab.base import Base, ModelConfig, quantized, room, weight_bytes
from trimtab.base.fingerprint import own_weights, weights_hash
from trimtab.base.loading import read_skeleton
from trimtab.base.quantized import StoredMatrix
from trimtab.core.errors import ArtifactError, BaseChanged, NotMergeable, RecipeError, UnsupportedModel
from trimtab.core.processes import processes
from trimtab.data import pack_flat
from trimtab.data.example import TokenRow
from trimtab.deploy import load_adapter, load_model, merge, save_adapter
from trimtab.distributed import Engine
from trimtab.engine import check_packing, describe_layers, generate, pack_logprobs
from trimtab.methods import Method, Sample, attach, weight_matrix
from trimtab.methods.lora import LoRA

pytest.importorskip("bitsandbytes")
pytest.importorskip("accelerate")

KINDS = ("nf4", "int8")
REFUSED = ("dora", "full")
"""Methods that change the weights themselves, or start from them."""
METHODS = sorted(set(Method.names()) - set(REFUSED))
ROWS = random_rows(7, 12, 5)
IDS = torch.tensor(random_rows(11, 11))
SAMPLE = Sample(rows=random_rows(40, seed=5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folders of tiny models, by family."""
    root = tmp_path_factory.mktemp("models")

    def of(family):
        if not (root / family).exists():
            tiny(family).save_pretrained(root / family)
        return root / family

    return of


@pytest.fixture
def load(folder):
    def of(kind, family="llama"):
        return Base.load_folder(folder(family), torch.float32, torch.device("cpu"), quantize=kind, with_tokenizer=False)

    return of


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


def adapted(base, name):
    adapter = attach(base.model, method_of(name), sample=SAMPLE)
    perturb(adapter.parameters(), 0.05)
    return adapter


def by_hand(module):
    """The float64 matrix that a quantized module's bits stand for, from the formats' definitions."""
    if type(module).__name__ == "Linear8bitLt":  # row-wise: w = q · largest / 127
        stored = module.state_dict()
        return stored["weight"].double() * stored["SCB"].double()[:, None] / 127
    state = module.weight.quant_state  # two weights a byte, the first in the higher four bits; 64 share a scale
    codes = torch.stack([module.weight.data >> 4, module.weight.data & 15], dim=-1).flatten().long()
    inner = state.state2
    scales = (
        inner.code.double()[state.absmax.long()] * inner.absmax.double().repeat_interleave(inner.blocksize)[: len(state.absmax)]
    )
    scales = scales + state.offset.double()
    weights = state.code.double()[codes] * scales.repeat_interleave(state.blocksize)[: len(codes)]
    return weights.view(module.out_features, module.in_features)


def dequantized(family, base):
    """The model in float with the matrices that the quantized one's bits stand for."""
    plain = tiny(family)
    for path, module in base.model.named_modules():
        if type(module).__module__.startswith("bitsandbytes"):
            weight, target = by_hand(module), plain.get_submodule(path)
            target.weight.data = (weight if isinstance(target, torch.nn.Linear) else weight.T).float().contiguous()
    return plain


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "qwen2", "gemma2"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_base_is_the_float_model_of_the_weights_that_its_bits_stand_for(kind, family, load):
    base = load(kind, family)
    assert (base.quantization, base.quantize) == (kind, kind)
    check_packing(base.model)
    torch.testing.assert_close(logits(base.model), logits(dequantized(family, base)), rtol=1e-4, atol=1e-4)
    assert (logits(base.model) - logits(tiny(family))).abs().max() > 1e-2  # and not the model it was made from
    for path in ("model.embed_tokens", "lm_head") if family != "gpt2" else ("transformer.wte", "lm_head"):
        assert base.model.get_submodule(path).weight.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", METHODS)
def test_gradients_reach_the_adapter_alone_and_are_those_on_the_dequantized_model(name, kind, load):
    base = load(kind)
    reference = dequantized("llama", base)
    gradients = []
    for model in (base.model, reference):
        adapter = attach(model, method_of(name), sample=SAMPLE)
        if model is base.model:
            perturb(adapter.parameters(), 0.05)
            state = adapter.state()
        adapter.load_state(state)
        pack = pack_flat(TokenRow(ids, list(range(1, len(ids))), "row") for ids in ROWS)
        pack_logprobs(model, pack).sum().backward()
        parameters = adapter.parameters()
        gradients.append({n: p.grad for n, p in parameters.items()})
        mine = {id(p) for p in parameters.values()}
        assert all(p.grad is None for p in model.parameters() if id(p) not in mine)
    ours, theirs = gradients
    assert all(gradient.abs().max() > 0 for gradient in ours.values())
    for n, gradient in theirs.items():
        torch.testing.assert_close(ours[n], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()), msg=n)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", METHODS)
def test_packed_rows_are_the_rows_alone_and_cached_decoding_is_the_full_pass(name, kind, load):
    base = load(kind)
    adapted(base, name)
    with torch.no_grad():
        packed = pack_logprobs(base.model, pack_flat(TokenRow(ids, list(range(1, len(ids))), "row") for ids in ROWS))
        alone = torch.stack([logprob_alone(base.model, ids, list(range(1, len(ids)))) for ids in ROWS])
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-4)  # float32: the same sums in another order
    for prompt, answer in zip(ROWS, generate(base.model, ROWS, [], max_new_tokens=12), strict=True):
        for at, token in enumerate(answer):
            with torch.no_grad():
                whole = base.model(input_ids=torch.tensor([prompt + answer[:at]]), use_cache=False).logits[0, -1]
            assert whole[token] > whole.max() - 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", METHODS)
def test_it_is_saved_and_loaded_on_a_base_quantized_alike_and_refused_on_others(name, kind, load, tmp_path):
    base = load(kind)
    before = logits(base.model)
    adapter = adapted(base, name)
    base.check_unchanged()
    save_adapter(base, adapter, tmp_path / "adapter")
    again = load(kind)
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again.model), logits(base.model))
    adapter.detach()
    assert torch.equal(logits(base.model), before)
    for other in {"none", *KINDS} - {kind}:
        held = "float32" if other == "none" else f"quantize: {other}"
        with pytest.raises(ArtifactError, match=rf"another base .*{held}\): different .*weights"):
            load_adapter(load(other), tmp_path / "adapter")


@pytest.mark.parametrize("kind", KINDS)
def test_its_base_is_loaded_again_as_it_was_quantized(kind, folder, tmp_path):
    base = Base.load(ModelConfig(name=str(folder("llama")), quantize=kind, device="cpu"))
    save_adapter(base, adapted(base, "lora"), tmp_path / "adapter")
    target = load_model(str(tmp_path / "adapter"))
    assert target.base.quantization == kind
    assert torch.equal(logits(target.base.model), logits(base.model))


@pytest.fixture(autouse=True)
def _tokenizers(monkeypatch):
    """Tiny models have none."""
    load_folder = Base.load_folder.__func__
    monkeypatch.setattr(
        Base, "load_folder", classmethod(lambda cls, *a, **k: load_folder(cls, *a, **{**k, "with_tokenizer": False}))
    )


@pytest.mark.parametrize("kind", KINDS)
def test_merging_into_it_and_methods_that_need_its_weights_are_refused(kind, load, tmp_path):
    base = load(kind)
    adapter = adapted(base, "lora")
    with pytest.raises(NotMergeable, match=rf"quantized \({kind}\).*train in float32 or bfloat16"):
        merge(base, adapter, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []
    layer = next(iter(adapter.layers.values()))
    for name in REFUSED:
        with pytest.raises(UnsupportedModel, match=r"is quantized, and .* such as lora"):
            attach(load(kind).model, method_of(name))
    for asked in (layer.merge, lambda: weight_matrix(layer)):
        with pytest.raises(UnsupportedModel, match="is quantized, and this method starts from or changes the weights"):
            asked()


@pytest.mark.parametrize("kind", KINDS)
def test_its_fingerprint_is_its_bits_however_it_came_to_be(kind, load, tmp_path):
    base, other = load(kind), load(kind)
    logits(base.model)
    assert base.fingerprint == other.fingerprint  # whether it has been used or not
    base.model.save_pretrained(tmp_path / "stored")
    stored = Base.load_folder(tmp_path / "stored", torch.float32, torch.device("cpu"))
    assert (stored.quantization, stored.quantize) == (kind, "none")
    assert stored.fingerprint == base.fingerprint
    assert torch.equal(logits(stored.model), logits(base.model))
    copied = copy.deepcopy(base.model)
    assert weights_hash(own_weights(copied)) == base.fingerprint["weights"]
    weight = base.model.model.layers[1].mlp.down_proj.weight
    weight.data.view(torch.uint8)[0, 0] ^= 1
    assert not torch.equal(logits(copied), logits(base.model))
    with pytest.raises(BaseChanged):
        base.check_unchanged()


def test_what_a_four_bit_base_computes_in_is_part_of_its_identity(folder):
    def wrapped(dtype):
        config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
        return Base(transformers.AutoModelForCausalLM.from_pretrained(folder("llama"), quantization_config=config))

    one, other = (wrapped(dtype).fingerprint for dtype in (torch.float32, torch.bfloat16))
    assert {part for part in one if one[part] != other[part]} == {"config"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_bfloat16_base_stays_bfloat16_and_its_adapter_float32(kind, folder):
    base = Base.load_folder(folder("qwen2"), torch.bfloat16, torch.device("cpu"), quantize=kind)  # with biases
    check_packing(base.model)
    digest = base.fingerprint
    adapter = adapted(base, "lora")
    assert {p.dtype for p in adapter.parameters().values()} == {torch.float32}
    out = base.model(input_ids=IDS, labels=IDS)
    out.loss.backward()
    assert out.logits.dtype == torch.bfloat16
    assert all(p.grad.isfinite().all() for p in adapter.parameters().values())
    base.check_unchanged()
    assert digest == base.fingerprint


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_that_bitsandbytes_stored_needs_the_memory_of_its_bits(kind, tmp_path, monkeypatch):
    """As the hub's *-bnb-4bit are, for devices on which the model would have no room otherwise."""
    make_model(tmp_path / "tiny", 0)
    base = Base.load(ModelConfig(name=str(tmp_path / "tiny"), dtype="float32", device="cpu", quantize=kind))
    base.model.save_pretrained(tmp_path / "stored")
    stored = ModelConfig(name=str(tmp_path / "stored"), dtype="float32", device="cpu")
    weights = read_skeleton(tmp_path / "stored")
    held, whole = (weight_bytes(weights, torch.float32, quantize) for quantize in (kind, "none"))
    assert held < 0.7 * whole
    for memory in (held + 1, held - 1):
        monkeypatch.setattr(room, "free_memory", lambda device, memory=memory: memory)
        if memory > held:
            assert Base.load(stored).quantization == kind
        else:
            with pytest.raises(RecipeError, match=r"GB free\. Use a device or machine with more memory\.$"):
                Base.load(stored)
    monkeypatch.setattr(type(processes), "size", 2)
    assert Engine.pick("auto").choose(stored, Method.pick("lora")).name == "ddp"


def test_another_kind_than_the_stored_one_is_refused(load, tmp_path):
    load("int8").model.save_pretrained(tmp_path / "stored")
    with pytest.raises(RecipeError, match=r"nf4, but .* int8"):
        Base.load_folder(tmp_path / "stored", torch.float32, torch.device("cpu"), quantize="nf4")


def test_kinds_that_are_not_known_are_refused(folder):
    import bitsandbytes

    head = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["embed_tokens"])
    with pytest.raises(UnsupportedModel, match="has a quantized head"):
        Base(transformers.AutoModelForCausalLM.from_pretrained(folder("llama"), quantization_config=head))
    model = tiny("llama")
    model.model.embed_tokens = bitsandbytes.nn.EmbeddingNF4(97, 32)
    with pytest.raises(UnsupportedModel, match="has a quantized EmbeddingNF4"):
        Base(model)
    half = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage=torch.bfloat16)
    with pytest.raises(UnsupportedModel, match=r"stores quantized weights as torch\.bfloat16"):
        Base(transformers.AutoModelForCausalLM.from_pretrained(folder("llama"), quantization_config=half))


def test_without_bitsandbytes_it_says_what_to_install(monkeypatch, folder):
    monkeypatch.setattr(quantized.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"nf4 needs bitsandbytes and accelerate.*trimtab\[quantized\]"):
        Base.load_folder(folder("llama"), torch.float32, torch.device("cpu"), quantize="nf4")


# By hand


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
@pytest.mark.parametrize("kind", KINDS)
def test_its_layers_are_computed_by_hand_from_the_matrices_that_its_bits_stand_for(kind, family, dtype, folder, monkeypatch):
    """Compared with float64 on the same matrices; never with a copy of all of them."""
    base = Base.load_folder(folder(family), dtype, torch.device("cpu"), quantize=kind)
    (words,) = describe_layers(base.model)
    assert words.endswith("self_attn, mlp by hand")
    pack = pack_flat(TokenRow(ids, list(range(1, len(ids))), "row") for ids in ROWS)
    calls, found = [], []
    real = StoredMatrix.dense
    monkeypatch.setattr(StoredMatrix, "dense", lambda self: calls.append(self) or real(self))
    for model in (base.model, dequantized(family, base).double()):
        adapter = attach(model, LoRA(rank=2))
        if not found:
            perturb(adapter.parameters(), 0.05)
            state = adapter.state()
        adapter.load_state(state)
        logprobs = pack_logprobs(model, pack)
        gradients = torch.autograd.grad(logprobs.sum(), list(adapter.parameters().values()))
        found.append((logprobs.detach(), *gradients))
    matrices = sum(1 for _ in quantized.quantized_layers(base.model))
    assert len(calls) in (
        2 * matrices - 3,
        2 * matrices - 1,
    )  # forward and backward; what the first layer's input gets, nobody needs
    limit = 1e-5 if dtype == torch.float32 else 0.3
    for ours, exact in zip(*found, strict=True):
        assert float((ours.double() - exact).norm()) <= limit * float(exact.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_no_dequantized_matrix_outlives_its_product(kind, load, monkeypatch):
    base, pack = load(kind), pack_flat(TokenRow(ids, list(range(1, len(ids))), "row") for ids in ROWS)
    adapted(base, "lora")
    pack_logprobs(base.model, pack)

    def most():
        held, alive = [], []
        real = StoredMatrix.dense

        def dense(self):
            made = real(self)
            alive.append(weakref.ref(made))
            held.append(sum(one() is not None for one in alive))
            return made

        with monkeypatch.context() as patched:
            patched.setattr(StoredMatrix, "dense", dense)
            total = pack_logprobs(base.model, pack).sum()
            held.append(sum(one() is not None for one in alive))
            total.backward()
        return max(held)

    assert most() == 1
    kept, real = [], StoredMatrix.dense
    monkeypatch.setattr(StoredMatrix, "dense", lambda self: kept.append(real(self)) or kept[-1])
    assert most() > 1, "the negative control"


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_that_is_released_holds_nothing(kind, load):
    """The certificate's process loads it again on the same card; scales are in no parameter."""
    base = load(kind)

    def held():
        layers = list(quantized.quantized_layers(base.model))
        scales = [m.weight.quant_state if kind == "nf4" else (m.weight.SCB, m.state.SCB) for m in layers]
        return sum(p.nbytes for p in base.model.parameters()), sum(one not in (None, (None, None)) for one in scales)

    assert min(held()) > 0
    base.release()
    assert held() == (0, 0)
