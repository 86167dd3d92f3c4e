"""Models with state, sinks, unusual masks or calls: packs, trees, gradients and decoding, against the model's own code row by row."""

import pytest
import torch
import transformers
from accelerators import cuda_backend
from families import logprob_alone, perturb
from kinds import KINDS, WINDOW, branching_rows, kind

from trimtab.base import Base, context_length
from trimtab.core.attention import Rules
from trimtab.core.errors import DataError, UnsupportedModel
from trimtab.data.example import TokenRow
from trimtab.data.pack import pack_flat, pack_tree
from trimtab.engine import FrozenLayerCache, check, check_packing, generate, layouts, pack_logprobs, state_layers
from trimtab.engine.pass_mode import mode_of
from trimtab.evaluate import score_loss
from trimtab.methods import Sample, attach
from trimtab.methods._attach import active
from trimtab.methods._base import _token_axis
from trimtab.methods._matrices import left_frozen
from trimtab.methods._unsuited import asks_kind
from trimtab.methods.lora import LoRA
from trimtab.methods.prefix import PrefixTuning
from trimtab.methods.prompt import PromptTuning

ROWS = branching_rows()
STATEFUL = ["gated DeltaNet", "KDA", "Mamba 2", "Mamba 2 beside attention", "Mamba 1", "state alone", "short convolution"]


def relative(ours, reference):
    ours, reference = ours.detach(), reference.detach()
    return float(((ours - reference).abs() / reference.abs().clamp(min=1e-6)).max())


def alone(model):
    return torch.stack([logprob_alone(model, row.ids, row.target_indices) for row in ROWS])


def greedy(model, prompt, count):
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", KINDS)
def test_packs_trees_and_decoding_are_exact(name):
    model = kind(name)
    Base(model)
    check_packing(model)
    assert mode_of(model).caches == (name != "masks with learned numbers")
    with torch.no_grad():
        reference = alone(model)
        assert relative(pack_logprobs(model, pack_flat(ROWS)), reference) < 2e-6
        assert relative(pack_logprobs(model, pack_tree(ROWS)), reference) < 2e-6
        prompts = [ROWS[0].ids[:30], ROWS[2].ids[:7], ROWS[3].ids]
        assert [list(answer) for answer in generate(model, prompts, [], max_new_tokens=6)] == [
            greedy(model, p, 6) for p in prompts
        ]


@pytest.mark.parametrize("name", [*STATEFUL, "sinks", "masks with learned numbers", "head sizes by layer, shared keys"])
def test_gradients_of_a_tree_are_those_of_rows_alone(name):
    model = kind(name, torch.float64)
    target = (
        "in_proj" if name == "state alone" else r".*(q_proj|in_proj|in_proj_qkv|out_proj)" if name in STATEFUL else "q_proj"
    )
    adapter = attach(model, LoRA(rank=2, alpha=2.0, targets=(target,)))
    perturb(adapter.parameters())
    check_packing(model)
    parameters = list(adapter.parameters().values())
    weights = torch.arange(1.0, len(ROWS) + 1, dtype=torch.float64)
    packed = torch.autograd.grad((weights * pack_logprobs(model, pack_tree(ROWS))).sum(), parameters)
    expected = torch.autograd.grad((weights * alone(model)).sum(), parameters)
    size = max(float(gradient.abs().max()) for gradient in expected)
    assert size > 1e-3
    # Transformers' scans compute in float32 whatever the model's dtype.
    assert max(float((a - b).abs().max()) for a, b in zip(packed, expected, strict=True)) < 1e-4 * size


@pytest.mark.parametrize("name", STATEFUL)
def test_no_gradient_crosses_rows(name):
    model, seen = kind(name), []
    handle = model.get_input_embeddings().register_forward_hook(lambda _, __, out: seen.append(out.requires_grad_()) or out * 1)
    pack = pack_flat(ROWS)
    logprobs = pack_logprobs(model, pack)
    handle.remove()
    (gradient,) = torch.autograd.grad(logprobs[1], seen[0])
    own = slice(*pack.segments[1][:2])
    assert float(gradient[0, own].abs().max()) > 0
    gradient[0, own] = 0
    assert float(gradient.abs().max()) == 0


@pytest.mark.parametrize("by_batches", [False, True])
@pytest.mark.parametrize("broken", ["convolution", "scan", "parents"])
def test_a_state_that_leaks_or_is_lost_is_noticed(broken, by_batches, monkeypatch):
    """The negative control: each of these leaves a model that runs, and is refused; by the recurrence in C, and by Transformers' scan."""
    scan, batches = state_layers.branching_scan, state_layers.batches
    if by_batches:
        monkeypatch.setattr(state_layers, "branching_scan", lambda *_: None)
    if broken == "convolution":
        monkeypatch.setattr(layouts.PackLayout, "before", property(lambda self: torch.arange(-1, self.segments[-1].end - 1)))
    elif broken == "scan":
        monkeypatch.setattr(state_layers, "_scan", lambda function, *args, **kwargs: function(*args, **kwargs))
        state_layers._branching_forward.cache_clear()
    elif by_batches:
        monkeypatch.setattr(state_layers, "batches", lambda *given: [batch._replace(depth=0) for batch in batches(*given)])
    else:

        def without_parents(function, arguments, segments):
            return scan(function, arguments, tuple(segment._replace(parent=-1) for segment in segments))

        monkeypatch.setattr(state_layers, "branching_scan", without_parents)
    try:
        with pytest.raises(UnsupportedModel, match="so it cannot be trained on packed examples exactly"):
            check_packing(kind("gated DeltaNet"))
    finally:
        state_layers._branching_forward.cache_clear()


def test_the_recurrence_in_c_and_transformers_scan_agree(monkeypatch):
    model = kind("gated DeltaNet")
    with torch.no_grad():
        ours = pack_logprobs(model, pack_tree(ROWS))
        monkeypatch.setattr(state_layers, "branching_scan", lambda *_: None)
        assert relative(ours, pack_logprobs(model, pack_tree(ROWS))) < 1e-6


@pytest.mark.parametrize("name", ["gated DeltaNet", "Mamba 2"])
def test_state_on_an_accelerator_goes_through_transformers_scans(name):
    """Which call fla's and mamba-ssm's kernels where those are installed."""
    model = kind(name)
    with torch.no_grad():
        on_cpu = pack_logprobs(model, pack_tree(ROWS))
        with cuda_backend():
            assert relative(pack_logprobs(model, pack_tree(ROWS)), on_cpu) < 2e-6


@pytest.mark.parametrize("ignored", ["sinks", "window"])
def test_rules_that_are_ignored_are_noticed(ignored, monkeypatch):
    attended, causal = layouts.attend, layouts.causal
    monkeypatch.setattr(layouts, "attend", lambda q, k, v, m, rules: attended(q, k, v, m, rules._replace(**{ignored: None})))
    monkeypatch.setattr(layouts, "causal", lambda q, k, rules, device: causal(q, k, rules._replace(**{ignored: None}), device))
    monkeypatch.setattr(layouts.PackLayout, "mask", lambda self, rules, device: None)
    model = kind("sinks")
    if ignored == "window":  # then rows may not exceed it
        check_packing(model)
        assert context_length(model) == WINDOW
        return
    with pytest.raises(UnsupportedModel, match="so it cannot be trained on packed examples exactly"):
        check_packing(model)


def test_windows_are_compared_at_their_real_size_where_shrinking_them_changes_nothing(monkeypatch):
    """Layers may have their window from elsewhere: then rows of the check are as long as it."""
    model = kind("sinks")
    monkeypatch.setattr(check, "local_sizes", lambda model: {"other_window": 16})
    lengths = []
    rows = check._Rows.__init__
    monkeypatch.setattr(check._Rows, "__init__", lambda self, *given: (lengths.append(given[1:]), rows(self, *given))[1])
    check_packing(model)
    assert lengths[-1] == (8,)


def test_an_indexer_is_exact_up_to_what_it_chooses():
    model = transformers.DeepseekV32ForCausalLM(
        transformers.DeepseekV32Config(
            vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
            max_position_embeddings=256, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
            n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=16, first_k_dense_replace=1,
            index_topk=40, index_head_dim=16, index_n_heads=2,
        )
    ).eval()  # fmt: skip
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.requires_grad_(False).parameters():
            parameter.normal_(0, 0.2) if parameter.ndim > 1 else None
    check_packing(model)
    assert context_length(model) == 40
    assert mode_of(model).materialized
    assert relative(pack_logprobs(model, pack_tree(ROWS)), alone(model)) < 2e-6  # 38 tokens, the longest
    prompt = ROWS[2].ids
    assert list(generate(model, [prompt], [], max_new_tokens=4)[0]) == greedy(model, prompt, 4)


@pytest.mark.parametrize("name", ["MLA", "head sizes by layer, shared keys", "gated DeltaNet", "KDA"])
def test_prefixes_have_the_sizes_of_each_layer(name):
    """Packs against each row in a pack of its own, and against the model's own forward pass where no window is exceeded."""
    model = kind(name)
    adapter = attach(model, PrefixTuning(tokens=3, width=4), sample=Sample(rows=[ROWS[0].ids]))
    perturb(adapter.parameters())
    own = torch.cat([pack_logprobs(model, pack_flat([row])) for row in ROWS])
    assert relative(pack_logprobs(model, pack_tree(ROWS)), own) < 2e-6
    with adapter.disabled():
        assert relative(pack_logprobs(model, pack_tree(ROWS)), own) > 1e-3
    row = ROWS[3]
    expected = logprob_alone(model, row.ids, row.target_indices)
    assert relative(pack_logprobs(model, pack_flat([row])), expected[None]) < 2e-6


def test_prompts_on_a_model_with_state_are_refused():
    with pytest.raises(UnsupportedModel, match=r"Qwen3_5ForCausalLM has layers that carry state.* Use a prefix"):
        attach(kind("gated DeltaNet"), PromptTuning(tokens=3), sample=Sample(rows=[ROWS[0].ids]))


def test_a_prefix_stands_where_the_models_own_forward_pass_goes():
    """OPT's forward pass calls the decoder in its trunk, not the trunk."""
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=97, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
        max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.OPTForCausalLM(config).eval()
    adapter = attach(model, PrefixTuning(tokens=3, width=4), sample=Sample(rows=[ROWS[0].ids]))
    perturb(adapter.parameters())
    assert list(adapter.layers) == ["model.decoder"]
    row = ROWS[3]
    ours = pack_logprobs(model, pack_flat([row]))
    assert relative(ours, logprob_alone(model, row.ids, row.target_indices)[None]) < 2e-6
    with adapter.disabled():
        assert relative(ours, logprob_alone(model, row.ids, row.target_indices)[None]) > 1e-3


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("two attentions a layer", "layers that attend more than once in a pass"),
        ("masks with learned numbers", "cannot run without masks"),
    ],
)
def test_models_whose_attention_has_no_place_for_a_prefix_are_refused(name, reason):
    with pytest.raises(UnsupportedModel, match=reason):
        attach(kind(name), PrefixTuning(tokens=3, width=4), sample=Sample(rows=[ROWS[0].ids]))


def test_chunks_are_those_of_each_row():
    """A key is seen by a query of its own chunk, counted from the row's first token: the masks that Transformers makes."""
    from transformers.masking_utils import chunked_causal_mask_function, sdpa_mask

    expected = sdpa_mask(
        1,
        11,
        11,
        mask_function=chunked_causal_mask_function(4, torch.zeros(1, dtype=int)),
        local_size=4,
        allow_is_causal_skip=False,
    )
    assert torch.equal(layouts.causal(11, 11, Rules(None, chunk=4), torch.device("cpu")), expected[0, 0])


def test_bert_like_heads_are_refused_before_anything_is_generated():
    config = transformers.BertConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, is_decoder=True
    )
    model = transformers.BertLMHeadModel(config).eval().requires_grad_(False)
    with pytest.raises(UnsupportedModel, match="so it cannot be trained on packed examples exactly"):
        generate(model, [[5, 6, 7]], [], max_new_tokens=3)


def test_code_that_reads_a_weight_under_an_adapter_learns_its_dtype_and_no_more():
    """Indexers ask their projection for its dtype; code that multiplied by the weight itself would pass the adapter by."""
    layer = attach(kind("sinks"), LoRA(rank=2, targets=("q_proj",))).layers["model.layers.0.self_attn.q_proj"]
    x = torch.zeros(2, 32)
    assert x.to(layer.weight.dtype).dtype == torch.float32
    assert (layer.in_features, layer.weight.shape) == (32, (32, 32))
    with pytest.raises(UnsupportedModel, match="computes with weight of a module that has an adapter"):
        torch.nn.functional.linear(x, layer.weight)
    with pytest.raises(AttributeError):
        _ = layer.nothing_of_the_kind


def test_scoring_asks_the_check_and_refuses_rows_that_are_too_long(monkeypatch):
    model = kind("gated DeltaNet")
    base = Base(model)
    mode_of(model).row_limit, mode_of(model).checked = 20, True
    with pytest.raises(
        DataError, match=r"row:0: has 38 tokens\. Qwen3_5ForCausalLM chooses what tokens attend to, and packs compute that"
    ):
        score_loss(base, ROWS)
    mode_of(model).checked = False
    monkeypatch.setattr(check, "_checked", {})
    monkeypatch.setattr(state_layers, "_convolve", lambda x, *_, **__: x)
    state_layers._branching_forward.cache_clear()
    with pytest.raises(UnsupportedModel, match="so it cannot be trained on packed examples exactly"):
        score_loss(base, ROWS)
    monkeypatch.undo()
    state_layers._branching_forward.cache_clear()


NO_PREFIX = {"state alone", "two attentions a layer", "layers that run several times", "masks with learned numbers"}


@pytest.mark.parametrize("name", sorted(KINDS.keys() - NO_PREFIX))
def test_a_models_shape_is_known_without_its_weights(name):
    """`trimtab methods MODEL` counts a prefix's parameters by a pass without numbers."""
    with torch.device("meta"):
        skeleton = KINDS[name]()
    method = PrefixTuning(tokens=3, width=4)
    assert method.parameter_count(skeleton) == method.parameter_count(kind(name))


def test_all_linear_leaves_what_it_would_adapt_in_vain():
    """Mamba 1 multiplies by the weight of dt_proj itself; an indexer passes no gradient. LoRA on the rest is exact, routed too."""
    model = kind("Mamba 1")
    assert "2 × Linear (the model's code computes with its weight itself)" in left_frozen(model)
    adapters = [attach(model, LoRA(rank=2, alpha=2.0), seed=n, name=f"adapter {n}") for n in range(2)]
    assert not any("dt_proj" in path for path in adapters[0].layers)
    for number, adapter in enumerate(adapters):
        perturb(adapter.parameters(), seed=number)
    pack = pack_flat(ROWS)
    owners = ["adapter 0", "adapter 1", None, "adapter 0", "adapter 1"]
    with torch.no_grad():
        routed = pack_logprobs(model, pack, owners)
        for row, owner, ours in zip(ROWS, owners, routed, strict=True):
            with active(model, *([owner] if owner else [])):
                assert relative(ours, logprob_alone(model, row.ids, row.target_indices)) < 2e-6


def test_a_model_that_restores_the_shape_of_its_input_keeps_all_tokens():
    """GPT-BigCode views its last hidden states in the shape of its input, so its last layer may not leave tokens out."""
    torch.manual_seed(0)
    config = transformers.GPTBigCodeConfig(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    model = transformers.GPTBigCodeForCausalLM(config).eval().requires_grad_(False)
    row = TokenRow(ROWS[2].ids, [len(ROWS[2].ids) - 1], "its last token alone")
    with torch.no_grad():
        assert relative(pack_logprobs(model, pack_flat([row])), logprob_alone(model, row.ids, row.target_indices)) < 2e-6


def test_nothing_is_kept_below_layers_that_run_several_times():
    model = kind("layers that run several times")
    paths = [path for path, _ in model.named_modules() if path.endswith("q_proj")]
    adapter = attach(model, LoRA(rank=2, targets=(paths[-1],)))
    perturb(adapter.parameters())
    kept = FrozenLayerCache(model, 1e9)
    pack = pack_flat(ROWS)
    first, second = (pack_logprobs(model, pack, frozen_cache=kept) for _ in range(2))
    assert kept.lowest is None
    assert not kept.rows
    assert torch.equal(first, second)


def test_a_module_that_gets_part_of_the_tokens_is_refused_for_rows_of_different_adapters():
    with pytest.raises(UnsupportedModel, match=r"gets \(1, 1, 8\), which does not hold all 5 tokens"):
        _token_axis(torch.zeros(1, 1, 8), 5)
    assert _token_axis(torch.zeros(1, 5, 8), 5) == 1


def test_a_block_that_asks_of_which_class_its_mlp_is_has_no_bottleneck():
    """ERNIE 4.5 VL calls a mixture with more arguments than a dense MLP, and tells them apart by their classes."""
    from transformers.models.ernie4_5_vl_moe import modeling_ernie4_5_vl_moe
    from transformers.models.llama import modeling_llama

    asking = object.__new__(modeling_ernie4_5_vl_moe.Ernie4_5_VLMoeDecoderLayer)
    plain = object.__new__(modeling_llama.LlamaDecoderLayer)
    assert asks_kind(asking, "mlp")
    assert not asks_kind(asking, "self_attn")
    assert not asks_kind(plain, "mlp")


@pytest.mark.parametrize("name", ["a window that masks alone say", "chunks, counted tokens"])
def test_a_local_mask_that_virtual_tokens_would_exceed_is_refused_in_the_models_own_pass(name):
    """Transformers counts a window or chunk without the virtual tokens; the layers of these models do not say its size."""
    model = kind(name)
    adapter = attach(model, PrefixTuning(tokens=3, width=4), sample=Sample(rows=[ROWS[0].ids]))
    short, longer = (torch.tensor([ROWS[2].ids[:length]]) for length in (WINDOW - 3, WINDOW - 2))
    model(input_ids=short, use_cache=False)
    with pytest.raises(UnsupportedModel, match=rf"Rows of 9 tokens, virtual ones included, exceed .* \({WINDOW}\)"):
        model(input_ids=longer, use_cache=False)
    with adapter.disabled():
        model(input_ids=longer, use_cache=False)
