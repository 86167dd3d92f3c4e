"""`layers`: which of a model's layers a method adapts."""

import json

import peft
import pytest
import torch
from families import method_of, perturb, random_rows, tiny
from safetensors.torch import save_file

from trimtab.core.errors import NoSuchModule, RecipeError
from trimtab.engine import FrozenLayerCache
from trimtab.methods import Method, attach
from trimtab.methods._layers import layer_numbers, stack_of_layers
from trimtab.methods.full import Full
from trimtab.methods.ia3 import IA3
from trimtab.methods.lora import LoRA

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # PEFT's own
WITH_LAYERS = [name for name in Method.names() if "layers" in Method.member(name).model_fields]


def numbers(sites, stack):
    return {int(path.removeprefix(f"{stack}.").split(".")[0]) for path in sites if path.startswith(f"{stack}.")}


@pytest.mark.parametrize(
    ("written", "text", "meant"),
    [
        ("16-31", "16-31", range(16, 32)), ("24-", "24-", range(24, 32)), ("0, 1,30", "0-1, 30", [0, 1, 30]),
        ([30, 0, 1], "0-1, 30", [0, 1, 30]), (5, "5", [5]),
        ("3-5, 4-9, 10", "3-10", range(3, 11)),
        ("2-, 7", "2-", range(2, 32)), ("0-0", "0", [0]),
    ],
)  # fmt: skip
def test_one_notation_whatever_is_written(written, text, meant):
    method = LoRA(layers=written)
    assert method.layers == text
    assert layer_numbers(text, 32) == list(meant)
    assert (
        LoRA.parse(method.plain() | {"layers": method.layers} if "name" not in method.plain() else {"layers": text}) == method
    )


@pytest.mark.parametrize("wrong", ["-4", "16:31", "a", [], [True], 1.5, "1,,2", [-1]])
def test_what_is_no_number_of_layers_is_refused(wrong):
    with pytest.raises(
        RecipeError, match=r"layers: expected numbers of layers from 0 on, and ranges of them: 16-31, 24- \(to the last\)"
    ):
        LoRA(layers=wrong)
    with pytest.raises(RecipeError, match="layers: 9-3 is an empty range: write 3-9"):
        LoRA(layers="9-3")


def test_methods_with_virtual_tokens_have_no_such_key():
    assert {*Method.names()} - {*WITH_LAYERS} == {"prefix", "prompt", "ptuning", "ptuning_v2", "tokens"}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", WITH_LAYERS)
def test_nothing_outside_the_layers_is_adapted_and_all_inside_is(name, family):
    model = tiny(family)
    stack, count = stack_of_layers(model)
    whole = method_of(name)
    some = Method.member(name).parse({**{k: v for k, v in whole.plain().items() if k != "name"}, "layers": f"{count - 1}"})
    everywhere, there = whole.sites(model), some.sites(model)
    assert numbers(everywhere, stack) == set(range(count))
    assert there == [path for path in everywhere if path.startswith(f"{stack}.{count - 1}.")]
    adapter = attach(model, some)
    assert sum(p.numel() for p in adapter.parameters().values()) == some.parameter_count(model)


def test_a_layer_that_the_model_does_not_have_and_a_target_outside_of_them_are_refused():
    model = tiny("llama")
    _, count = stack_of_layers(model)
    with pytest.raises(
        NoSuchModule, match=rf"layers: the model has {count} layers, 0 to {count - 1}, and 0-40 is not among them\."
    ):
        LoRA(layers="0-40").sites(model)
    with pytest.raises(NoSuchModule, match=r"layers: the model has .* and 40- is not among them"):
        Full(layers="40-").sites(model)
    with pytest.raises(NoSuchModule, match="targets: 'lm_head' is in none of the layers 0, which are all that `layers` adapts"):
        LoRA(targets=["q_proj", "lm_head"], layers=0).sites(model)
    with pytest.raises(NoSuchModule, match=r"outputs: 'layers\.1\.self_attn\.v_proj' is in none of the layers 0"):
        IA3(outputs=["layers.1.self_attn.v_proj"], layers=0).sites(model)
    assert LoRA(targets=["q_proj", "lm_head"]).sites(model)


def test_layers_below_the_first_adapted_one_are_not_in_the_backward_pass_and_their_outputs_are_kept():
    model = tiny("llama")
    _, count = stack_of_layers(model)
    assert count > 1
    attach(model, LoRA(rank=2, layers=f"{count - 1}"))
    cache = FrozenLayerCache(model, 1e9)
    assert cache.lowest is model.model.layers[count - 1]
    seen = []
    for layer in model.model.layers:
        layer.register_forward_hook(
            lambda module, given, out: seen.append((out[0] if isinstance(out, tuple) else out).requires_grad)
        )
    model(torch.tensor(random_rows(6)))
    assert seen == [False] * (count - 1) + [True]
    other = tiny("llama")
    attach(other, LoRA(rank=2))
    assert FrozenLayerCache(other, 1e9).lowest is None


@pytest.mark.parametrize("name", ["lora", "dora", "miss", "oft", "ia3", "bitfit", "layernorm"])
def test_peft_computes_the_same_with_what_is_saved(name, tmp_path):
    model = tiny("llama")
    _, count = stack_of_layers(model)
    small = {"rank": 4} if "rank" in Method.member(name).model_fields else {"block_size": 8} if name == "oft" else {}
    adapter = attach(model, Method.member(name)(layers=f"{count - 1}", **small))
    perturb(adapter.parameters())
    ids = torch.tensor(random_rows(7))
    ours = model(ids).logits
    method, tensors = adapter.to_inference_form()
    config, renamed = method.to_peft(model, tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(renamed, tmp_path / "adapter_model.safetensors")
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path)(ids).logits
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert not torch.allclose(ours, tiny("llama")(ids).logits, atol=1e-3)


def test_what_peft_has_saved_of_some_layers_is_read():
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], layers_to_transform=[1], layers_pattern="layers", init_lora_weights=False
    )
    theirs = peft.get_peft_model(tiny("llama"), config)
    saved = {name: t.clone() for name, t in peft.get_peft_model_state_dict(theirs).items()}
    method, tensors = LoRA.from_peft(config.to_dict() | {"peft_type": "LORA", "task_type": "CAUSAL_LM"}, saved)
    model = tiny("llama")
    adapter = attach(model, method)
    adapter.load_state(tensors)
    assert list(adapter.layers) == ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    ids = torch.tensor(random_rows(7))
    assert torch.allclose(model(ids).logits, theirs(ids).logits, atol=1e-5)
