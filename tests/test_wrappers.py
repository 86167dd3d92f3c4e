"""Multimodal wrappers, trained on texts: read whole, adapted in their text model alone, and merged into what loads whole again."""

import json

import peft
import pytest
import torch
import transformers
from families import logprob_alone, method_of, perturb, random_rows
from safetensors.torch import load_file
from worlds import ROWS, make_model, write_rows
from wrappers import TEXT, WRAPPERS, save_wrapper, wrapper

from trimtab.base import Base
from trimtab.base.classes import auto_class
from trimtab.base.loading import read_model
from trimtab.core.errors import NoSuchModule
from trimtab.core.wrapping import base_modules, text_modules
from trimtab.data.example import TokenRow
from trimtab.data.pack import pack_flat
from trimtab.deploy import load_adapter, merge, save_adapter
from trimtab.engine import check_packing
from trimtab.engine.forward import pack_logprobs
from trimtab.methods import Method, attach
from trimtab.methods.lora import LoRA

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's own

TEXT_ID = 8
"""Tokens from this one on are no placeholders of images."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("wrappers")
    return {kind: save_wrapper(kind, root / kind) for kind in WRAPPERS}


def prompts(vocabulary=290):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(TEXT_ID, vocabulary, (2, 12), generator=generator)


@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_wrapper_is_loaded_by_name_whole_and_trained_in_its_text_model_alone(kind, folders):
    base = Base.load(str(folders[kind]))
    original = wrapper(kind)
    assert type(base.model) is type(original)
    loaded = base.model.state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in original.state_dict().items())
    adapter = attach(base.model, LoRA(rank=2))
    assert len(adapter.layers) == 14
    assert all(".language_model.layers." in path for path in adapter.layers)
    perturb(adapter.parameters())
    check_packing(base.model)
    rows = [TokenRow([TEXT_ID + i for i in ids], list(range(1, len(ids))), "t") for ids in random_rows(9, 5)]
    packed = pack_logprobs(base.model, pack_flat(rows))
    alone = torch.stack([logprob_alone(base.model, row.ids, row.target_indices) for row in rows])
    assert torch.allclose(packed, alone, rtol=1e-5)
    assert not torch.allclose(
        packed, torch.stack([logprob_alone(original, row.ids, row.target_indices) for row in rows]), rtol=1e-2
    )
    packed.sum().backward()
    assert all(bool(parameter.grad.any()) for parameter in adapter.parameters().values())  # texts reach all of it


def outside(method, model):
    text = text_modules(model)
    return [path for path in method.sites(model) if path not in text]


METHODS = [
    name for name in Method.names() if name not in ("prefix", "prompt", "ptuning", "ptuning_v2", "tokens", "oft", "miss")
]


@pytest.mark.parametrize("name", METHODS)
def test_no_method_adapts_what_texts_never_reach(name, monkeypatch):
    for kind in ("gemma3", "qwen3_vl"):
        model, method = wrapper(kind), method_of(name)
        assert method.sites(model)
        assert not outside(method, model)
    if name in ("layernorm", "full"):  # as they were before they looked
        for module in ("_structure", "_matrices", "full"):
            monkeypatch.setattr(f"trimtab.methods.{module}.text_modules", base_modules)
        assert outside(method, model)


def test_attention_is_the_text_models_and_a_name_of_both_is_too():
    for targets in ("attention", "q_proj", ".*_proj"):
        model = wrapper("gemma3")
        assert sum("vision_tower" in path and path.endswith("q_proj") for path in base_modules(model))
        sites = LoRA(targets=targets).sites(model)
        assert sites
        assert all("language_model" in path for path in sites)


@pytest.mark.parametrize(
    ("method", "targets", "module"),
    [
        ("lora", "fc1", "model.vision_tower.encoder.layers.0.mlp.fc1"),
        ("lora", "patch_embedding", "model.vision_tower.embeddings.patch_embedding"),
        ("lora", r"vision_tower\..*", "model.vision_tower.embeddings"),
        ("layernorm", "post_layernorm", "model.vision_tower.post_layernorm"),
        ("full", "multi_modal_projector", "model.multi_modal_projector"),
    ],
)
def test_a_target_that_texts_never_reach_is_refused_with_the_reason(method, targets, module):
    with pytest.raises(NoSuchModule) as caught:
        Method.member(method)(targets=targets).sites(wrapper("gemma3"))
    assert f"targets: {targets!r} names {module}" in str(caught.value)
    assert "text examples never reach it" in str(caught.value)
    with pytest.raises(NoSuchModule, match=r"matches no module of Gemma3ForConditionalGeneration\.|names none of the modules"):
        Method.member(method)(targets="nonsense").sites(wrapper("gemma3"))


@pytest.mark.parametrize("kind", WRAPPERS)
def test_saved_loaded_read_by_peft_and_merged_it_is_one_model(kind, folders, tmp_path):
    base = Base.load(str(folders[kind]))
    adapter = attach(base.model, LoRA(rank=2))
    perturb(adapter.parameters())
    ids = prompts()
    expected = base.model(input_ids=ids).logits
    save_adapter(base, adapter, tmp_path / "adapter")
    again = Base.load(str(folders[kind]))
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(again.model(input_ids=ids).logits, expected)
    plain = transformers.AutoModelForImageTextToText.from_pretrained(folders[kind])
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.allclose(theirs(input_ids=ids).logits, expected, atol=1e-4)

    merge(base, adapter, tmp_path / "merged", prompts=ids.tolist())
    merged = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    assert type(merged) is type(base.model)
    with torch.no_grad():
        assert torch.allclose(merged(input_ids=ids).logits, expected, atol=1e-4)
    own, text = merged.state_dict(), text_modules(wrapper(kind))
    towers = {name: t for name, t in wrapper(kind).state_dict().items() if name.rpartition(".")[0] not in text}
    assert len(towers) > 10
    assert all(torch.equal(tensor, own[name]) for name, tensor in towers.items())
    stored, before = (load_file(folder / "model.safetensors").keys() for folder in (tmp_path / "merged", folders[kind]))
    assert stored == before
    for name in ("preprocessor_config.json", "processor_config.json", "tokenizer.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (folders[kind] / name).read_bytes()


def test_a_merged_text_model_has_no_files_of_a_processor(tmp_path):
    make_model(tmp_path / "tiny", 0)
    (tmp_path / "tiny" / "preprocessor_config.json").write_text("{}")
    base = Base.load(str(tmp_path / "tiny"))
    merge(base, attach(base.model, LoRA(rank=2)), tmp_path / "merged")
    assert not (tmp_path / "merged" / "preprocessor_config.json").exists()


CLASSES = [
    ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "AutoModelForCausalLM"),
    ({"model_type": "qwen3_5", "architectures": ["Qwen3_5ForCausalLM"]}, "AutoModelForCausalLM"),
    ({"model_type": "qwen3_5", "architectures": ["Qwen3_5ForConditionalGeneration"]}, "AutoModelForMultimodalLM"),
    ({"model_type": "qwen3_5"}, "AutoModelForMultimodalLM"),
    ({"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}, "AutoModelForMultimodalLM"),
    ({"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}, "AutoModelForCausalLM"),
    ({"model_type": "llama4", "architectures": ["Llama4ForConditionalGeneration"]}, "AutoModelForMultimodalLM"),
    ({"model_type": "mistral3", "architectures": ["SomethingElse"]}, "AutoModelForMultimodalLM"),
    ({"model_type": "voxtral"}, "AutoModelForMultimodalLM"),
    ({"model_type": "unheard_of"}, "AutoModelForCausalLM"),
    ({}, "AutoModelForCausalLM"),
]


@pytest.mark.parametrize(("config", "name"), CLASSES, ids=[json.dumps(config) for config, _ in CLASSES])
def test_the_class_that_reads_a_checkpoint_whole(config, name):
    assert auto_class(config).__name__ == name


def test_the_vision_tower_stays_where_transformers_would_read_the_text_model_alone(tmp_path):
    torch.manual_seed(0)
    text = TEXT | {"vocab_size": 64, "layer_types": ["full_attention"] * 2}
    vision = dict(
        depth=1, hidden_size=16, intermediate_size=24, num_heads=2, patch_size=8, out_hidden_size=32, num_position_embeddings=16
    )
    config = transformers.Qwen3_5Config(text_config=text, vision_config=vision)
    model = transformers.Qwen3_5ForConditionalGeneration(config)
    model.save_pretrained(tmp_path)
    loaded = read_model(tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    alone = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not any("visual" in name for name in alone.state_dict())


def test_a_wrappers_fingerprint_has_the_settings_of_its_text_model(folders):
    first, other = (Base(wrapper("mistral3")) for _ in range(2))
    assert first.fingerprint["config"] == other.fingerprint["config"]
    changed = wrapper("mistral3")
    changed.config.text_config.rope_parameters = {"rope_type": "default", "rope_theta": 5e5}
    assert Base(changed).fingerprint["config"] != first.fingerprint["config"]


def test_a_whole_run(folders, tmp_path, monkeypatch, trimtab):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", ROWS)
    recipe = (
        f"model: {folders['gemma3']}\ndata: {{train: rows.jsonl, eval: 4}}\nmethod: {{rank: 2}}\noutput: run\ncertify: false\n"
    )
    (tmp_path / "r.yaml").write_text(recipe + "train: {epochs: 2, rows_per_step: 8, lr: 2e-2}\n")
    done = trimtab("train", "r.yaml")
    assert done.code == 0, done.err
    done = trimtab("merge", "run", "merged", "--force")
    assert done.code == 0, done.err
    assert "tokens/s" not in done.err
    assert Base.load("merged").has_template
