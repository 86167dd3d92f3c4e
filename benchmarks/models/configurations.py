"""Tiny random models of every class that Transformers registers: small sizes by the names of a configuration's numbers.

Windows, chunks, blocks and top-k are 8 or less, so that the rows of `references.rows` exceed all of them.
"""

import dataclasses
import re
from contextlib import suppress
from typing import Any, NamedTuple

import torch
import transformers
from models.overrides import OVERRIDES, VARIANTS
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto

VOCABULARY, LAYERS, HEAD = 128, 4, 16
MOST_PARAMETERS = 40_000_000
"""A class that is larger though its configuration is tiny holds a size that no rule knows."""

SIZES: dict[str, float] = {
    r"(\w+_)?vocab_size(_per_layer_input)?": VOCABULARY,
    r"hidden_size|d_model|n_embd|emb_dim|embed_dim|(input_|output_)?embedding_size|embedding_dim|word_embed_proj_dim|lru_width"
    r"|attention_hidden_size|decoder_hidden_size|text_hidden_size|hidden_size_global|out_hidden_size|projection_dim|encoder_hidden_size": 64,
    r"mamba_d_ssm": 128,
    r"base_channels|vision_output_dim|projector_(in|out)put_dim|merged_hidden_size|projector_hidden_size": 64,
    r"(\w+_)?intermediate_size(_mlp)?|((de|en)coder_)?ffn_dim|ffn_hidden_size|n_inner|dff|d_ff|dim_ff|d_inner|feed_forward_size"
    r"|expert_ffn_hidden_size|share_expert_dim|mlp_dim|moe_hidden_size": 96,
    r"num(_en|_de)?(coder)?_(hidden_)?layers|n_layers?|(de|en)coder_layers|num_blocks|depth|layers": LAYERS,
    r"(swa_)?num_attention_heads|n_heads?|num_heads|(de|en)coder_attention_heads|num_(de|en)coder_attention_heads|attention_heads": 4,
    r"num_sliding_attention_heads|linear_num_heads|linear_num_value_heads": 4,
    r"(swa_)?num_key_value_heads|num_kv_heads|kv_n_heads|num_global_key_value_heads|linear_num_key_heads": 2,
    r"num_attention_groups|num_query_groups|n_mamba_heads": 2,
    r"(swa_)?head_dim|dim_head|d_kv|attention_head_size|kv_channels|d_head|global_head_dim|v_head_dim|qk_head_dim": HEAD,
    r"linear_(key_|value_)?head_dim|mamba_d_head|mamba_head_dim|index(er)?_head_dim": HEAD,
    r"(ssm_)?state_size|mamba_d_state|q_lora_rank|kv_lora_rank|o_lora_rank|hc_lowrank|router_hidden_size|rel_extent": 16,
    r"hidden_size_per_layer_input": 16,
    r"max_position_embeddings|n_positions|max_seq_len|n_ctx|max_(target|source)_positions|model_max_length": 512,
    r"sliding_window(_size)?|(attention_|keep_)?window_size|attention_chunk_size|floor_scale|index_topk|local_attention"
    r"|local_attention_window_len|mem_len|log_scaling_n_floor|chunk_size|mamba_chunk_size|block_size": 8,
    r"mamba_n(um)?_heads|qk_rope_head_dim|qk_nope_head_dim|rotary_dim|laurel_rank|gated_norm_rank|adapter_rank|loop_gate_rank|d_rel": 8,
    r"mamba_dt_rank|time_step_rank": 8,
    r"(num|n_routed|num_local|moe_num)_experts": 4,
    r"num_experts_per_tok(en)?|moe_topk|moe_k|moe_top_k|top_k_experts|num_selected_experts": 2,
    r"n_shared_experts|num_shared_experts|moe_num_shared_experts|n_group|num_expert_group|topk_group|n_groups|mamba_n_?groups"
    r"|first_k_dense_replace|num_dense_layers|moe_layer_start_index|num_mem_blocks": 1,
    r"index_block_size": 4,
    r"index_n_heads|index_topk_blocks|o_groups|num_kv_shared_layers|layer_group_size|zero_expert_num|global_attn_every_n_layers": 2,
    r"attn_layer_period|expert_layer_period": 2,
    r"dim_model_base": 32,
    r"loop_layer_index_start": 1,
    r"loop_layer_index_end": 3,
    r"loop_num_passes": 2,
    r"attn_layer_offset|expert_layer_offset": 1,
}  # fmt: skip
"""A number whose name matches is at most this."""
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "decoder_start_token_id": 1, "eos_token_id": 2, "sep_token_id": 2}
OTHER_TOKEN = re.compile(r"(image|video|audio|vision|boi|eoi|boa|eoa|eod|mask|cls)\w*token_(id|index)")
RANDOM = re.compile(r"(\w+_)?(\w*drop(out|path)?(_prob|_rate|_p)?|\w*pdrop|jitter\w*|layerdrop)")


class Case(NamedTuple):
    """A model that is asked about."""

    name: str
    kind: str
    """Its `model_type`."""
    model: str
    """Its class."""
    overrides: dict[str, Any]
    """Of its configuration; a dictionary for a configuration within it."""


def cases() -> dict[str, Case]:
    """Every registered class, those that read images as `vl:…`, and variants with what is off by default."""
    found: dict[str, Case] = {}
    for mark, registered in (
        ("", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        ("vl:", modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
    ):
        for kind, classes in registered.items():
            for number, model in enumerate((classes,) if isinstance(classes, str) else classes):
                name = mark + kind + (f":{model}" if number else "")
                if (known := found.get(kind)) is None or known.model != model:
                    found[name] = Case(name, kind, model, OVERRIDES.get(name, {}))
    for name, (kind, model, overrides) in VARIANTS.items():
        found[name] = Case(name, kind, model, overrides)
    return found


def build(case: Case) -> Any:
    """The case's model, in float32, with weights large enough that a wrong mask, position or scale shows."""
    config = tiny_config(_config_class(case), case.overrides)
    model_class = getattr(transformers, case.model)
    with torch.device("meta"):
        outline = model_class(config)
    if (size := sum(p.numel() for p in outline.parameters())) > MOST_PARAMETERS:
        name, largest = max(outline.named_parameters(), key=lambda named: named[1].numel())
        raise ValueError(f"{size:,} parameters: {name} is {tuple(largest.shape)}")
    torch.manual_seed(0)
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.ndim > 1:
                parameter.normal_(0, 0.2)
            elif parameter.is_floating_point():
                parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if "bias" in name.rpartition(".")[2] and buffer.is_floating_point() and buffer.ndim == 1:  # of routers
                buffer.add_(0.1 * torch.randn_like(buffer))
    return model.eval().requires_grad_(False).float()


def _config_class(case: Case) -> type[PreTrainedConfig]:
    """The configuration of its type, or where that is another model's, the class's own."""
    own = getattr(transformers, case.model).config_class
    mapped = transformers.CONFIG_MAPPING.get(case.kind, own)
    return mapped if own is None or issubclass(mapped, own) else own


def tiny_config(kind: type[PreTrainedConfig], overrides: dict[str, Any]) -> PreTrainedConfig:
    """A small configuration of a class: by rule, and what the overrides say instead."""
    usual = _usual(kind)
    layers, few = usual.get("num_hidden_layers"), overrides.get("num_hidden_layers", LAYERS)
    values: dict[str, Any] = {}
    for name, value in usual.items():
        if name in overrides and not isinstance(value, PreTrainedConfig):
            continue
        if isinstance(value, PreTrainedConfig):
            inner = dict(overrides.get(name, {}))
            other = inner.pop("model_type", None)
            values[name] = tiny_config(transformers.CONFIG_MAPPING[other] if other else type(value), inner)
        elif isinstance(value, list | tuple) and layers and len(value) == layers > 2:
            values[name] = [small if (small := _smaller(name, one, 0)) is not None else one for one in _fewer(value, few)]
        elif isinstance(value, dict) and "mrope_section" in value:
            values[name] = value | {"mrope_section": _sections(value, usual)}
        elif name == "num_key_value_heads" and "kv_lora_rank" in usual:
            values[name] = 4  # multi-head latent attention: as many as there are heads
        elif (small := _smaller(name, value, len(values))) is not None:
            values[name] = small
    return kind(**{**values, **{k: v for k, v in overrides.items() if not isinstance(values.get(k), PreTrainedConfig)}})


def _usual(kind: type[PreTrainedConfig]) -> dict[str, Any]:
    """What a configuration says by default, of all that it can be given."""
    if not dataclasses.is_dataclass(kind):
        return {name: value for name, value in vars(kind()).items() if not name.startswith("_")}
    fields = [field for field in dataclasses.fields(kind) if not field.name.startswith("_")]
    defaults = {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}
    with suppress(Exception):  # its defaults do not fit each other
        example = kind()
        for field in fields:
            with suppress(Exception):  # it differs by layer
                value = getattr(example, field.name)
                defaults[field.name] = defaults.get(field.name) if value is None else value
    return defaults


def _smaller(name: str, value: Any, number: int) -> Any:
    """A number or token instead of a configuration's usual one; None to leave it."""
    if name in TOKENS:
        return TOKENS[name] if value is not None else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if OTHER_TOKEN.fullmatch(name):
        return VOCABULARY - 1 - number % 8
    if RANDOM.fullmatch(name):
        return type(value)(0)
    size = next((size for pattern, size in SIZES.items() if re.fullmatch(pattern, name)), None)
    return None if size is None or value <= 0 else type(value)(min(value, size))


def _fewer(values: Any, count: int) -> Any:
    """What is said of each layer, for fewer of them: its kinds in turn."""
    kinds = [value for number, value in enumerate(values) if value not in values[:number]]
    return type(values)(kinds[number % len(kinds)] for number in range(count))


def _sections(rotary: dict[str, Any], usual: dict[str, Any]) -> list[int]:
    """How many frequencies of a small head are for time, height and width, in their usual shares."""
    size = _smaller("qk_rope_head_dim", usual.get("qk_rope_head_dim"), 0) or HEAD
    total = int(size * rotary.get("partial_rotary_factor", 1.0)) // 2
    usual = rotary["mrope_section"]
    exact = [total * section / sum(usual) for section in usual]
    sections = [int(share) for share in exact]
    for number in sorted(range(len(exact)), key=lambda n: sections[n] - exact[n])[: total - sum(sections)]:
        sections[number] += 1
    return sections
