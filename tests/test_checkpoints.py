"""Checkpoints as people have them: sharded, pickled, quantized, at a revision; read exactly, or refused by name."""

import importlib.util
import json
import shutil

import huggingface_hub
import pytest
import torch
import transformers
from families import tiny
from safetensors.torch import load_file, save_file
from worlds import make_model, make_tokenizer
from wrappers import save_wrapper

from trimtab.base import Base, ModelConfig, locate, skeleton
from trimtab.core.errors import RecipeError, StorageError, TrimtabError, UnsupportedModel
from trimtab.core.hub import at_revision, parse_hub_name
from trimtab.deploy import copy_adapter, load_adapter, load_model, merge, save_adapter
from trimtab.methods import attach
from trimtab.methods.lora import LoRA


def load(folder, **settings):
    return Base.load_folder(folder, torch.float32, torch.device("cpu"), with_tokenizer=False, **settings)


def refused(folder, error=TrimtabError, **settings):
    with pytest.raises(error) as caught:
        load(folder, **settings)
    return str(caught.value)


# Files


def test_a_sharded_model_is_read_whole_and_a_missing_shard_is_named(tmp_path):
    model = tiny("llama")
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    shards = sorted((tmp_path / "model").glob("model-*.safetensors"))
    assert len(shards) > 2
    loaded = load(locate.loadable_place(str(tmp_path / "model"))).model.state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())
    shards[1].unlink()
    assert shards[1].name in refused(tmp_path / "model", UnsupportedModel)


def test_pickled_weights_are_refused_with_the_command_that_converts_them(tmp_path, monkeypatch):
    model = tiny("llama")
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "model.safetensors").unlink()
    names = sorted(tensors)
    for number, part in enumerate((names[:9], names[9:])):
        torch.save({name: tensors[name] for name in part}, tmp_path / "model" / f"pytorch_model-{number}.bin")
    index = {"weight_map": {name: f"pytorch_model-{int(n >= 9)}.bin" for n, name in enumerate(names)}, "metadata": {}}
    (tmp_path / "model" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(UnsupportedModel) as caught:
        Base.load(str(tmp_path / "model"))
    said = str(caught.value)
    assert "pickled weights (pytorch_model-0.bin, pytorch_model-1.bin), which can run code when they are read" in said
    command = said.split("python -c ")[1].splitlines()[0].strip().strip("'")
    exec(command)  # what it says is what works
    converted = load(tmp_path / "model-safetensors").model.state_dict()
    assert all(torch.equal(tensor, converted[name]) for name, tensor in model.state_dict().items())


# Stored quantized


def with_quantization(folder, **settings):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))


REFUSED = {
    "gptq": "GPTQ", "awq": "AWQ", "compressed-tensors": "compressed-tensors (llm-compressor)", "hqq": "HQQ", "aqlm": "AQLM",
    "torchao": "torchao", "nvfp4": "NVFP4", "mxfp8": "MXFP8", "fbgemm_fp8": "FP8 by row (fbgemm)", "bitnet": "BitNet",
    "auto-round": "AutoRound", "invented-in-2027": "invented-in-2027",
}  # fmt: skip


@pytest.mark.parametrize("method", REFUSED)
def test_other_quantizations_are_refused_by_name_before_any_weight_is_read(method, tmp_path, monkeypatch):
    tiny("llama").save_pretrained(tmp_path)
    load(tmp_path)
    with_quantization(tmp_path, quant_method=method, bits=4)
    monkeypatch.setattr("safetensors.safe_open", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)  # no package would dequantize it
    (tmp_path / "model.safetensors").write_bytes(b"never read")
    said = refused(tmp_path, UnsupportedModel)
    assert f"is stored quantized by {REFUSED[method]} (quantization_config in config.json)" in said
    assert "nothing was loaded" in said
    assert "model.quantize: nf4" in said
    with pytest.raises(UnsupportedModel, match="is stored quantized by"):
        skeleton(str(tmp_path))


def test_the_text_model_of_a_wrapper_may_say_it(tmp_path):
    save_wrapper("mistral3", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["text_config"]["quantization_config"] = {"quant_method": "awq"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert "is stored quantized by AWQ" in refused(tmp_path / "model")


FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def mxfp4(tensors, names):
    """Store these matrices of experts, E inputs outputs, in MXFP4: E outputs groups 16 bytes, and a power of two for each 32 numbers.

    Returns what they stand for, worked out number by number."""
    generator, meant = torch.Generator().manual_seed(0), {}
    for name in names:
        experts, inputs, outputs = tensors.pop(name).shape
        codes = torch.randint(16, (experts, outputs, inputs), generator=generator)
        exponents = torch.randint(124, 128, (experts, outputs, inputs // 32), generator=generator)
        pairs = codes.view(experts, outputs, inputs // 32, 16, 2)
        tensors[f"{name}_blocks"] = (pairs[..., 0] | pairs[..., 1] << 4).to(
            torch.uint8
        )  # the first number in the low half of a byte
        tensors[f"{name}_scales"] = exponents.to(torch.uint8)
        values = torch.tensor([(-1.0 if code & 8 else 1.0) * FP4[code & 7] for code in codes.flatten().tolist()]).view(
            codes.shape
        )
        scale = torch.tensor([2.0 ** (e - 127) for e in exponents.flatten().tolist()]).view(exponents.shape)
        meant[name] = (values * scale.repeat_interleave(32, dim=-1)).transpose(1, 2)
    return meant


def gpt_oss(folder):
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        num_local_experts=4, num_experts_per_tok=2, sliding_window=8, max_position_embeddings=128, pad_token_id=1, eos_token_id=1,
    )  # fmt: skip
    model = transformers.GptOssForCausalLM(config)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    experts = [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    assert len(experts) == 4
    meant = mxfp4(tensors, experts)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    with_quantization(folder, quant_method="mxfp4", modules_to_not_convert=["model.layers.*.self_attn", "lm_head"])
    make_tokenizer().save_pretrained(folder)
    return model, meant


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mxfp4_is_dequantized_to_what_its_numbers_stand_for_and_the_memory_is_said(dtype, tmp_path, capfd):
    model, meant = gpt_oss(tmp_path / "oss")
    told = []
    base = Base.load(ModelConfig(name=str(tmp_path / "oss"), dtype=dtype), told.append)
    own, kind = base.model.state_dict(), getattr(torch, dtype)
    for name, tensor in {**model.state_dict(), **meant}.items():
        assert torch.equal(own[name], tensor.to(kind)), name
    assert base.quantization == "none"
    assert "MXFP4" not in capfd.readouterr().err  # Transformers says bfloat16, whatever it is
    assert base.notes == tuple(told)
    size = sum(p.numel() for p in model.parameters()) * kind.itemsize / 1e9
    assert told == [
        f"{tmp_path / 'oss'} is stored in mxfp4, and is dequantized to {dtype}, in which its weights take {size:,.1f} GB of memory"
    ]
    name, tensor = next(iter(meant.items()))
    assert not torch.equal(own[name], tensor.transpose(1, 2).reshape(tensor.shape).to(kind))  # a wrong order is seen
    base.model.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    again = load(tmp_path / "plain").model.state_dict()
    assert all(torch.equal(again[name], tensor.to(torch.float32)) for name, tensor in own.items())


def fp8(folder, size=16):
    """A Llama whose matrices in blocks are stored in FP8 with a scale for each block, and what they stand for."""
    model = tiny("llama")
    model.save_pretrained(folder)
    tensors, meant = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors[name]
        rows, columns = (-(-length // size) for length in weight.shape)
        scales = torch.linspace(0.5, 2.0, rows * columns).view(rows, columns)
        spread = scales.repeat_interleave(size, 0).repeat_interleave(size, 1)[: weight.shape[0], : weight.shape[1]]
        tensors[name] = (weight / spread).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scales
        meant[name] = tensors[name].float() * spread
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with_quantization(folder, quant_method="fp8", activation_scheme="dynamic", weight_block_size=[size, size])
    return model, meant


def test_fp8_is_dequantized_to_what_its_numbers_stand_for(tmp_path):
    model, meant = fp8(tmp_path / "fp8")
    own = load(tmp_path / "fp8").model.state_dict()
    for name, tensor in {**model.state_dict(), **meant}.items():
        assert torch.equal(own[name], tensor), name
    name = next(iter(meant))
    assert not torch.equal(own[name], model.state_dict()[name])  # it is rounded indeed
    make_tokenizer().save_pretrained(tmp_path / "fp8")
    base = Base.load(str(tmp_path / "fp8"))
    assert "is stored in fp8, and is dequantized to float32" in base.notes[0]
    assert load_model(str(tmp_path / "fp8")).notes == base.notes
    adapter = attach(base.model, LoRA(rank=2))
    save_adapter(base, adapter, tmp_path / "adapter")
    load_adapter(Base.load(str(tmp_path / "fp8")), tmp_path / "adapter")
    merge(base, adapter, tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())


def test_fp8_of_which_transformers_would_misplace_scales_is_refused(tmp_path):
    _, meant = fp8(tmp_path, size=24)  # 32 rows: two blocks, of 24 and 8
    assert "is not whole blocks of 24 × 24" in refused(tmp_path, UnsupportedModel)
    settings = transformers.FineGrainedFP8Config(dequantize=True)
    wrong = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings).state_dict()
    assert any(not torch.equal(wrong[name].float(), tensor) for name, tensor in meant.items())  # why


def compressed(folder, preset, form):
    """A Llama whose matrices in blocks compressed-tensors has stored, and what they stand for, from the formats' definitions."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams

    model = tiny("llama", torch.bfloat16)
    groups = {"group_0": preset_name_to_scheme(preset, ["Linear"])}
    if groups["group_0"].weights.group_size:
        groups["group_0"].weights.group_size = 16
    settings = QuantizationConfig(config_groups=groups, ignore=["lm_head"], format=form, quantization_status="frozen")
    apply_quantization_config(model, settings)
    for module in model.modules():
        if (scheme := getattr(module, "quantization_scheme", None)) is not None:
            rows = module.weight.unflatten(1, (-1, scheme.weights.group_size or module.in_features))
            scale, zero = calculate_qparams(rows.amin(2), rows.amax(2), scheme.weights)
            module.weight_scale.data = scale.to(torch.bfloat16)
            if not scheme.weights.symmetric:
                module.weight_zero_point.data = zero.to(module.weight_zero_point.dtype)
    ModelCompressor(quantization_config=settings).compress_model(model)
    model.save_pretrained(folder)
    ModelCompressor(quantization_config=settings).update_config(folder)
    return stands_for(load_file(folder / "model.safetensors"), groups["group_0"].weights.num_bits)


def stands_for(tensors, bits):
    """(steps − zero) · scale, of steps that lie in 32-bit words, the first in the lowest bits, or in numbers of their own."""

    def unpacked(words):
        steps = (words.long()[:, :, None] >> torch.arange(0, 32, bits)) & (2**bits - 1)
        return (steps.flatten(1) - 2 ** (bits - 1)).float()

    meant = {}
    for name in [name.removesuffix("_scale") for name in tensors if name.endswith("weight_scale")]:
        scale = tensors[f"{name}_scale"].float()[..., None]
        steps = tensors[name].float() if name in tensors else unpacked(tensors[f"{name}_packed"])
        zero = unpacked(tensors[f"{name}_zero_point"].T).T[..., None] if f"{name}_zero_point" in tensors else 0.0
        meant[name] = ((steps.unflatten(1, (scale.shape[1], -1)) - zero) * scale).flatten(1).to(torch.bfloat16).float()
    return meant


COMPRESSED = [
    ("W4A16", "pack-quantized"), ("W4A16_ASYM", "pack-quantized"), ("W8A16", "pack-quantized"), ("W8A8", "int-quantized"),
    ("FP8_DYNAMIC", "float-quantized"), ("FP8_DYNAMIC", "naive-quantized"),
]  # fmt: skip


@pytest.mark.parametrize(("preset", "form"), COMPRESSED)
def test_compressed_tensors_are_dequantized_to_what_their_numbers_stand_for(preset, form, tmp_path):
    meant = compressed(tmp_path / "stored", preset, form)
    base = load(tmp_path / "stored")
    own = base.model.state_dict()
    assert len(meant) == 14
    assert all(torch.equal(own[name], tensor) for name, tensor in meant.items())
    plain = tiny("llama").state_dict()
    assert all(not torch.equal(own[name], plain[name]) for name in meant)
    assert {type(module) for module in base.model.modules() if hasattr(module, "in_features")} == {torch.nn.Linear}
    assert "quantization_config" not in base.model.config.to_dict()


@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig", "Float8WeightOnlyConfig"])
def test_torchaos_tensors_are_dequantized_once_they_are_compared_with_what_its_layers_compute(kind, tmp_path, monkeypatch):
    quantization = pytest.importorskip("torchao.quantization")
    tiny("llama", torch.bfloat16).save_pretrained(tmp_path / "plain")
    settings = transformers.TorchAoConfig(getattr(quantization, kind)())
    quantized = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=settings, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    quantized.save_pretrained(tmp_path / "stored")
    base = Base.load_folder(tmp_path / "stored", torch.bfloat16, torch.device("cpu"), with_tokenizer=False)
    plain, stored = load(tmp_path / "plain").model, dict(quantized.named_parameters())
    for name, parameter in base.model.named_parameters():
        assert type(parameter.data) is torch.Tensor
        assert torch.equal(parameter, plain.get_parameter(name).bfloat16()) == (not name.endswith("_proj.weight"))
        if name.endswith("_proj.weight"):
            data = stored[name].data
            meant = data.qdata.float() * data.scale.float()
            assert float((parameter - meant).abs().max()) <= 2**-7 * float(meant.abs().max())
    assert "quantization_config" not in base.model.config.to_dict()
    if kind.startswith("Float8"):
        return  # whose layers compute with what is dequantized
    monkeypatch.setattr(type(data), "dequantize", lambda self: torch.zeros(self.shape, dtype=torch.bfloat16))
    assert "is not the matrix of a product" in refused(tmp_path / "stored", UnsupportedModel)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"format": "marlin-24"}, "format marlin-24"),
        ({"format": "pack-quantized", "strategy": "block"}, "scales by ['block']"),
        ({"format": "pack-quantized", "second": {"strategy": "group", "num_bits": 8}}, "in several forms at once"),
        ({"format": "pack-quantized", "sparsity_config": {"format": "sparse-24"}}, "in several forms at once"),
    ],
)
def test_what_of_compressed_tensors_is_not_proved_is_refused(settings, said, tmp_path, monkeypatch):
    tiny("llama").save_pretrained(tmp_path)
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *a: object() if name == "compressed_tensors" else found(name, *a)
    )
    groups = {"group_0": {"weights": {"strategy": settings.pop("strategy", "group"), "num_bits": 4}}}
    groups |= {"group_1": {"weights": settings.pop("second")}} if "second" in settings else {}
    with_quantization(tmp_path, quant_method="compressed-tensors", config_groups=groups, **settings)
    assert said in refused(tmp_path, UnsupportedModel)


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_what_is_quantized_already_is_not_quantized_again(quantize, tmp_path):
    fp8(tmp_path)
    assert f"model.quantize: {quantize}, but {tmp_path} is stored in fp8" in refused(tmp_path, RecipeError, quantize=quantize)


# A revision on the hub


def test_a_name_has_a_revision_or_none():
    assert parse_hub_name("org/model") == ("org/model", None)
    assert parse_hub_name("org/model@v1.0") == ("org/model", "v1.0")
    assert parse_hub_name("org/model@refs/pr/3") == ("org/model", "refs/pr/3")
    for other in ("/folder/model@v1", "./a@b", "model@v1", "~/m@x"):
        assert parse_hub_name(other) == (other, None)
        assert at_revision(other, "v1") == other
    assert at_revision("org/model", "v1") == "org/model@v1"
    assert at_revision("org/model", None) == "org/model"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The cache of a hub on which `org/model` has two commits, one of them a tag, and no connection."""
    cache = tmp_path / "hub"
    repository = cache / "models--org--model"
    for seed, (commit, reference) in enumerate((("a" * 40, "main"), ("b" * 40, "v1"))):
        make_model(repository / "snapshots" / commit, seed)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / reference).write_text(commit)
        config = repository / "snapshots" / commit / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"mark": reference}))
    from transformers.utils import hub as transformers_hub

    for module in (huggingface_hub.constants, huggingface_hub.file_download):
        for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(transformers_hub, "is_offline_mode", lambda: True, raising=False)
    return repository


def test_a_revision_is_what_is_loaded_and_stored_and_merged(hub, tmp_path):
    main, tagged = Base.load("org/model"), Base.load("org/model@v1")
    assert main.fingerprint["weights"] != tagged.fingerprint["weights"]
    assert tagged.fingerprint == Base.load("org/model@" + "b" * 40).fingerprint
    assert tagged.source == tagged.config.name == "org/model@v1"
    skeleton("org/model@v1")
    adapter = attach(tagged.model, LoRA(rank=2))
    save_adapter(tagged, adapter, tmp_path / "adapter")
    stored = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (stored["base_model_name_or_path"], stored["revision"]) == ("org/model", "v1")
    assert load_model(str(tmp_path / "adapter")).base.fingerprint == tagged.fingerprint
    (tmp_path / "adapter" / "trimtab.json").rename(tmp_path / "kept.json")  # now it is PEFT's
    assert load_model(str(tmp_path / "adapter")).base.fingerprint == tagged.fingerprint
    (tmp_path / "kept.json").rename(tmp_path / "adapter" / "trimtab.json")
    copy_adapter(main, tmp_path / "adapter", tmp_path / "copy")
    copied = json.loads((tmp_path / "copy" / "adapter_config.json").read_text())
    assert copied["base_model_name_or_path"] == "org/model"
    assert not copied.get("revision")
    merge(tagged, adapter, tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text()).get("mark") == "v1"
    with pytest.raises(StorageError, match="org/model@v2"):
        Base.load("org/model@v2")


# Templates beside the tokenizer


@pytest.mark.parametrize("file", ["chat_template.json", "processor_config.json", "chat_template.jinja"])
def test_a_template_beside_the_tokenizer_is_read_and_merged_along(file, tmp_path):
    template = make_tokenizer().chat_template
    folder = save_wrapper("gemma3", tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    assert not Base.load(str(folder)).has_template
    (folder / file).write_text(template if file.endswith("jinja") else json.dumps({"chat_template": template}))
    base = Base.load(str(folder))
    assert base.tokenizer.chat_template == template
    adapter = attach(base.model, LoRA(rank=2))
    merge(base, adapter, tmp_path / "merged")
    assert (tmp_path / "merged" / file).read_bytes() == (folder / file).read_bytes()
    assert Base.load(str(tmp_path / "merged")).fingerprint["template"] == base.fingerprint["template"]
    other = tmp_path / "other.jinja"
    other.write_text(template.replace("user", "User") + "{# other #}")
    base = Base.load(ModelConfig(name=str(folder), chat_template=str(other)))
    merge(base, attach(base.model, LoRA(rank=2)), tmp_path / "with-other")
    assert Base.load(str(tmp_path / "with-other")).tokenizer.chat_template == other.read_text()
    if file.endswith("json"):  # a processor's goes before the tokenizer's
        kept = tmp_path / "with-other" / file
        assert not kept.exists() or "chat_template" not in json.loads(kept.read_text())


def test_a_model_without_a_template_gets_one_from_a_file(tmp_path):
    make_model(tmp_path / "plain", 0, template=None)
    assert not Base.load(str(tmp_path / "plain")).has_template
    file = tmp_path / "own.jinja"
    file.write_text(make_tokenizer().chat_template)
    base = Base.load(ModelConfig(name=str(tmp_path / "plain"), chat_template=str(file)))
    make_model(tmp_path / "tiny", 0)
    other = Base.load(str(tmp_path / "tiny"))
    assert base.fingerprint == other.fingerprint
    assert base.tokenizing_hash == Base.load(base.config).tokenizing_hash != Base.load(str(tmp_path / "plain")).tokenizing_hash
    shutil.rmtree(tmp_path / "tiny")
