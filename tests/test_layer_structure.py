"""The structure of decoder layers, found by watching them: which parts are computed by hand, and that nothing else changes."""

import copy

import pytest
import torch
import transformers
from families import perturb, tiny
from kinds import _COMMON, _EXPERTS, _LOCAL, _MAMBA, KINDS, VOCABULARY, WINDOW, _of, branching_rows, kind
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm

from trimtab.core import attention_hook
from trimtab.core.attention_hook import remove_hook
from trimtab.data import pack_flat, pack_tree
from trimtab.engine import FrozenLayerCache, learning, pack_logprobs
from trimtab.engine.patching import layers_by_hand, layers_of, unfused
from trimtab.methods import attach
from trimtab.methods.lora import LoRA
from trimtab.methods.prefix import PrefixTuning

ROWS = branching_rows()
_YARN = dict(
    rope_type="yarn", rope_theta=1e4, factor=8.0, original_max_position_embeddings=16, beta_fast=32.0, beta_slow=1.0, mscale=1.0,
    mscale_all_dim=1.0, llama_4_scaling_beta=0.1,
)  # fmt: skip

STRUCTURES = {
    "experts": (lambda: _of("Qwen3Moe", head_dim=16, **_EXPERTS), "self_attn"),
    "layers without rotation": (lambda: _of("SmolLM3", no_rope_layers=[1, 0, 1, 0]), "self_attn mlp"),
    "norms after, of all heads": (lambda: _of("Olmo2"), "self_attn mlp"),
    "and windows": (lambda: _of("Olmo3", layer_types=_LOCAL, sliding_window=WINDOW), "self_attn mlp"),
    "neighbours rotated, in part": (lambda: _of("Glm4", head_dim=8), "self_attn mlp"),
    "neighbours rotated": (lambda: _of("Ernie4_5", head_dim=8), "self_attn mlp"),
    "queries scaled by position": (lambda: _of("Ministral3", head_dim=8, rope_parameters=_YARN), "self_attn mlp"),
    "sinks": (KINDS["sinks"], "self_attn"),
    "sinks and a residual multiplier": (
        lambda: _of("GraniteSWA", residual_multiplier=0.5, attention_multiplier=0.4, layer_types=_LOCAL, sliding_window=WINDOW), "self_attn mlp",
    ),
    "a gate beside the queries, state": (KINDS["gated DeltaNet"], "self_attn mlp"),
    "a gate of its own": (KINDS["an attention output that is viewed"], "self_attn mlp"),
    "attention and MLP side by side": (
        lambda: _of("Cohere2", layer_types=_LOCAL, sliding_window=WINDOW), "self_attn mlp",
    ),
    "an MLP without a gate": (lambda: _of("Apertus"), "self_attn"),
    "norms after rotation": (lambda: _of("HunYuanDenseV1", head_dim=8), "mlp"),
    "short convolution": (KINDS["short convolution"], "self_attn feed_forward"),
    "experts beside an MLP": (KINDS["Mamba 2"], "self_attn shared_mlp"),
    "tuples": (lambda: _of("Bamba", **_MAMBA, attn_layer_indices=[1, 3]), "self_attn feed_forward"),
    "one mixer a layer": (
        lambda: _of(
            "NemotronH", head_dim=8, mamba_num_heads=8, mamba_head_dim=8, ssm_state_size=8, n_groups=1, chunk_size=8, num_hidden_layers=None,
            layers_block_type=["linear_attention", "full_attention", "mlp", "linear_attention"],
        ), "mixer",
    ),
    "attention beside Mamba": (KINDS["Mamba 2 beside attention"], "self_attn"),
    "shared keys, and more after the MLP": (KINDS["head sizes by layer, shared keys"], "mlp"),
    "values that are keys": (
        lambda: _of("Gemma4", head_dim=8, global_head_dim=16, layer_types=_LOCAL, num_kv_shared_layers=0, sliding_window=WINDOW,
                    hidden_size_per_layer_input=0, attention_k_eq_v=True, num_global_key_value_heads=2), "self_attn mlp",
    ),
}  # fmt: skip
"""Models, and which of their modules are computed by hand in some layer, norms aside."""


def model_of(name):
    """Its numbers as large as those of tests/kinds.py."""
    torch.manual_seed(0)
    model = STRUCTURES[name][0]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def by_hand(model):
    """The names of the modules that are computed by hand in some layer; of norms, "norm" alone."""
    structures = [layer.forward.learned for layer in layers_of(model)]
    names = {name for structure in structures if not isinstance(structure, str) for name in structure.by_hand}
    return {"norm" if "norm" in name else name for name in names}


def logprobs_and_gradients(model, adapter):
    logprobs = pack_logprobs(model, pack_tree(ROWS[:3]))
    weights = torch.linspace(-1, 2, 3, dtype=logprobs.dtype)
    gradients = torch.autograd.grad(logprobs @ weights, list(adapter.parameters().values()))
    return logprobs.detach(), gradients


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_layer_by_hand_is_its_own_code(name):
    """Log-probabilities and gradients in float32, against the model's own code in float64."""
    model = model_of(name)
    exact = copy.deepcopy(model).double()
    if hasattr(exact, "set_experts_implementation"):
        exact.set_experts_implementation("eager")
    target = ("mixer.*_proj",) if name == "one mixer a layer" else (r".*(q_proj|k_proj|o_proj|out_proj|up_proj|w1|down_proj)",)
    pair = [attach(one, LoRA(rank=2, targets=target)) for one in (model, exact)]
    perturb(pair[0].parameters(), 0.1)
    for ours, theirs in zip(*(adapter.parameters().values() for adapter in pair), strict=True):
        theirs.data.copy_(ours)
    ours, gradients = logprobs_and_gradients(model, pair[0])
    with unfused():
        reference, slopes = logprobs_and_gradients(exact, pair[1])
    assert by_hand(model) - {"norm"} == set(STRUCTURES[name][1].split()), layers_by_hand(model)
    assert float(((ours - reference) / reference).abs().max()) < 1e-5
    size = max(float(slope.abs().max()) for slope in slopes)
    assert max(float((a - b).abs().max()) for a, b in zip(gradients, slopes, strict=True)) < 1e-4 * size


@pytest.mark.parametrize(
    "name", ["sinks", "layers without rotation", "neighbours rotated, in part", "a gate beside the queries, state"]
)
def test_virtual_tokens_before_such_attention(name):
    model = model_of(name)
    adapter = attach(model, PrefixTuning(tokens=3, init="random"))
    perturb(adapter.parameters())
    ours, gradients = logprobs_and_gradients(model, adapter)
    with unfused():
        reference, slopes = logprobs_and_gradients(model, adapter)
    assert "self_attn" in by_hand(model)
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=0)
    for a, b in zip(gradients, slopes, strict=True):
        assert float((a - b).abs().max()) < 1e-4 * float(b.abs().max())


def scaled(layer):
    def forward(self, hidden_states, **kwargs):
        out, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + 0.97 * out
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))

    return type("Scaled", (LlamaDecoderLayer,), {"forward": forward})


def with_more(layer):
    def forward(self, hidden_states, **kwargs):
        return LlamaDecoderLayer.forward(self, hidden_states, **kwargs) + 1e-3 * hidden_states

    return type("WithMore", (LlamaDecoderLayer,), {"forward": forward})


def between(layer):
    def forward(self, hidden_states, **kwargs):
        out, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states) * 1.01, **kwargs)
        hidden_states = hidden_states + out
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))

    return type("Between", (LlamaDecoderLayer,), {"forward": forward})


WHOLE_LAYERS = {"a scaled residual connection": scaled, "one more term": with_more, "more between norm and attention": between}


def unlike(cls, kind):
    """A class of MLPs, norms or attention that differs a little from what it seems to be."""
    if kind is LlamaMLP:
        return {"forward": lambda self, x: self.down_proj(self.act_fn(self.gate_proj(x)) * (self.up_proj(x) + 1e-3))}
    if kind is LlamaRMSNorm:
        return {
            "forward": lambda self, x: (
                self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 3 * self.variance_epsilon)
            )
        }
    own = kind.forward

    def forward(self, hidden_states, position_embeddings, **kwargs):
        cos, sin = position_embeddings
        return own(self, hidden_states, position_embeddings=(cos, sin * 1.01), **kwargs)

    return {"forward": forward}


def same_pack(model):
    ours = pack_logprobs(model, pack_tree(ROWS)).detach()
    with unfused():
        return ours, pack_logprobs(model, pack_tree(ROWS)).detach()


@pytest.mark.parametrize("change", WHOLE_LAYERS.values(), ids=WHOLE_LAYERS)
def test_a_layer_that_adds_up_otherwise_calls_its_own_code(change):
    """Negative controls: what seems known, and is not quite."""
    model = tiny("llama")
    for layer in model.model.layers:
        layer.__class__ = change(layer)
    ours, own = same_pack(model)
    assert not any(layer.forward.learned.branches for layer in layers_of(model))
    torch.testing.assert_close(ours, own, rtol=2e-6, atol=0)


@pytest.mark.parametrize(
    ("part", "left"), [("mlp", "self_attn norm"), ("input_layernorm", "self_attn mlp norm"), ("self_attn", "mlp norm")]
)
def test_a_part_that_computes_otherwise_calls_its_own_code(part, left):
    model = tiny("llama")
    for layer in model.model.layers:
        module = getattr(layer, part)
        module.__class__ = type("Unlike", (type(module),), unlike(layer, type(module)))
    ours, own = same_pack(model)
    assert by_hand(model) == set(left.split())
    assert all(part not in layer.forward.learned.by_hand for layer in layers_of(model))
    torch.testing.assert_close(ours, own, rtol=2e-6, atol=0)


def test_what_is_known_wrong_is_noticed(monkeypatch):
    """The proof alone, without the explanation: wrong windows, epsilons, scales and rotations computed by hand are found out."""
    real = learning.structures_of

    def changed(part):
        def structures(seen):
            for structure in real(seen):
                first, *rest = structure.branches
                mixer = first.mixers[0]
                yield structure._replace(
                    branches=(first._replace(mixers=(mixer._replace(part=mixer.part._replace(**part)),)), *rest)
                )

        return structures

    for part in ({"scale": 0.3}, {"rotary": "none"}, {"rotary": "neighbours of halves"}, {"output": "q_proj"}):
        monkeypatch.setattr(learning, "structures_of", changed(part))
        model = tiny("llama")
        pack_logprobs(model, pack_flat(ROWS))
        assert all(isinstance(layer.forward.learned, str) for layer in layers_of(model)), part
    monkeypatch.setattr(learning, "structures_of", real)
    remove_hook(model)
    pack_logprobs(model, pack_flat(ROWS))
    assert not any(isinstance(layer.forward.learned, str) for layer in layers_of(model))


def test_a_failing_module_is_left_to_the_model_and_the_lesson_leaves_nothing_behind():
    model = tiny("llama")

    def forward(self, x):
        if x.shape[1] == len(learning.POSITIONS):
            raise ValueError("so few")
        return LlamaMLP.forward(self, x)

    before = torch.get_rng_state()
    own = tiny("llama")
    reference = pack_logprobs(own, pack_flat(ROWS))
    for layer in model.model.layers:
        layer.mlp.__class__ = type("Unable", (LlamaMLP,), {"forward": forward})
    torch.testing.assert_close(pack_logprobs(model, pack_flat(ROWS)), reference, rtol=1e-6, atol=0)
    assert all("so few" in layer.forward.learned for layer in layers_of(model))
    assert not any(module._forward_hooks for module in model.modules())
    torch.set_rng_state(before)


def test_layers_that_run_several_times_are_not_narrowed():
    model = kind("layers that run several times")
    ours, own = same_pack(model)
    assert not any(layer.forward.last for layer in layers_of(model))
    torch.testing.assert_close(ours, own, rtol=2e-5, atol=0)


UPPER = (r".*layers\.3\..*(q_proj|in_proj)",)


@pytest.mark.parametrize(("name", "kept"), [
    ("tuples", True), ("one mixer a layer", True), ("shared keys, and more after the MLP", False), ("four streams", False), ("experts", True),
])  # fmt: skip
def test_what_frozen_layers_hand_on_is_kept_if_it_is_hidden_states_alone(name, kept):
    if name == "four streams":
        config = {**_COMMON, "intermediate_size": [48] * 4, "head_dim": 8, "laurel_rank": 4, "num_kv_shared_layers": 2}
        inputs = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY}
        config = transformers.Gemma3nTextConfig(**config, **inputs, layer_types=_LOCAL, activation_sparsity_pattern=[0.0] * 4)
        model = transformers.Gemma3nForCausalLM(config).eval().requires_grad_(False)
    else:
        model = model_of(name)
    attach(model, LoRA(rank=2, targets=UPPER))
    cache = FrozenLayerCache(model, 1e9)
    found = [pack_logprobs(model, pack_tree(rows), frozen_cache=cache) for rows in (ROWS, ROWS[::-1])]
    assert bool(cache.rows) == kept
    with torch.no_grad():
        torch.testing.assert_close(found[1], pack_logprobs(model, pack_tree(ROWS[::-1])), rtol=1e-5, atol=0)


def test_windows_are_as_they_are_now(monkeypatch):
    """The check makes windows small for a moment, perhaps the one in which layers are learned."""
    monkeypatch.setattr(attention_hook, "_mask", lambda *args, own, **kwargs: None)  # then attention alone says them
    model = tiny("gemma3")
    pack_logprobs(model, pack_flat(ROWS))
    attention = model.model.layers[0].self_attn
    assert attention.sliding_window == 4
    found = []
    for window in (4, 9):
        attention.sliding_window = window
        ours, own = same_pack(model)
        torch.testing.assert_close(ours, own, rtol=1e-6, atol=0)
        found.append(ours)
    assert "self_attn" in by_hand(model)
    assert not torch.allclose(*found, rtol=1e-3)


def test_a_module_whose_forward_pass_is_patched_is_called():
    """Those that count tokens or carry state do in packs what few tokens may not show (temperatures of Llama 4)."""
    model = tiny("llama")
    for layer in model.model.layers:
        patched = type("Patched", (), {"is_patch": True, "__call__": lambda self, *args, **kwargs: self.own(*args, **kwargs)})()
        patched.own, layer.self_attn.forward = layer.self_attn.forward, patched
    ours, own = same_pack(model)
    assert by_hand(model) == {"mlp", "norm"}
    torch.testing.assert_close(ours, own, rtol=2e-6, atol=0)
