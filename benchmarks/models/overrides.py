"""What single models need beyond the rules of `configurations`, and variants with what is off by default. Data alone."""

from typing import Any

_DECODER = {"is_decoder": True}
_GEMMA4 = {
    "num_hidden_layers": 6, "num_kv_shared_layers": 2, "head_dim": 16, "global_head_dim": 32, "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
}  # fmt: skip
_QWEN4 = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8, "indexer_compress_ratio": 4,
    "ngram_vocab_size_base": 100, "split_ngram_parts": 1, "heads_per_ngram": 2, "head_dim": 16, "num_key_value_heads": 2,
    "num_attention_heads": 4, "layer_types": ["linear_attention", "indexed_attention"] * 2,
}  # fmt: skip
_HEADS = {"head_dim": 16, "num_key_value_heads": 2}
_CONVOLUTIONS = {"layer_types": ["conv", "full_attention"] * 2}
_WINDOWS = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8}
_SWITCHED_WINDOWS = {"use_sliding_window": True, **_WINDOWS}
_SPARSE = {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2}
_YARN = {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16, "beta_fast": 32.0,
    "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip

_ROTARY = {"rope_type": "default", "rope_theta": 1e4}
_ROTARY_BY_LAYER = {"sliding_attention": _ROTARY, "full_attention": _ROTARY}
_TIME_HEIGHT_WIDTH = {
    "text_config": {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
}

_IMAGE_WORD = {"vocabulary_map": {"<image>": 5}}
_DOTS3 = {
    "layer_types": ["indexed_attention", "sliding_attention"] * 2,
    "per_layer_config": {number: {"kv_lora_rank": 8} for number in ("01", "03")},
}

OVERRIDES: dict[str, dict[str, Any]] = {
    **dict.fromkeys((
        "bert", "bert-generation", "camembert", "roberta", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm", "electra", "ernie",
        "data2vec-text", "megatron-bert", "rembert", "roformer", "roc_bert",
    ), _DECODER),
    "xmod": {**_DECODER, "default_language": "en_XX"},
    "big_bird": {**_DECODER, "attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "reformer": {**_DECODER, "axial_pos_embds": False},
    **dict.fromkeys(("hunyuan_v1_dense", "ministral", "nemotron"), _HEADS),
    "hunyuan_v1_moe": {**_HEADS, "num_experts": 4, "moe_topk": 2},
    "vl:hunyuan_vl": {"text_config": {
        **_HEADS, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2, 2]},
    }},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_ssm": 128},
    "zamba": {"attention_hidden_size": 128, "attention_head_dim": 32},
    **dict.fromkeys(("dots3_note", "dots3_note_text"), _DOTS3),
    "vl:deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"] * 2, "num_experts_per_tok": 2}},
    "vl:molmo2": {"adapter_config": {"vision_feature_layer": [2, 1]}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1, "num_key_value_heads": 2,
    },
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "lfm2": _CONVOLUTIONS,
    "vl:lfm2_vl": {"text_config": _CONVOLUTIONS},
    "lfm2_moe": {**_CONVOLUTIONS, "num_dense_layers": 1},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "nemotron_h": {"layers_block_type": ["linear_attention", "full_attention", "mlp", "linear_attention"]},
    **dict.fromkeys(("gemma4_text", "gemma4_unified_text"), _GEMMA4),
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_unified": {"text_config": _GEMMA4},
    "qwen4_exp_text": _QWEN4,
    "qwen4_exp": _QWEN4,
    "vl:qwen4_exp": {"text_config": _QWEN4},
    "cohere_compass_text": {**_WINDOWS, "rope_parameters": _ROTARY_BY_LAYER},
    "vl:cohere_compass": {"text_config": {**_WINDOWS, "rope_parameters": _ROTARY_BY_LAYER}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "hrm_text": {"num_hidden_layers": 2, "num_layers_per_stack": 2, "L_cycles": 2, "L_bp_cycles": [2]},
    "blt": {"encoder_hash_byte_group_vocab": 100},
    "longcat_flash": {"head_dim": 8},
    "inkling2_loop_text": {"n_layers_per_attn_res_block": 1},
    "vl:inkling2_loop": {"text_config": {"n_layers_per_attn_res_block": 1}},
    **dict.fromkeys((
        "vl:qwen2_5_vl", "vl:qwen2_vl", "vl:glm46v", "vl:glm4v", "vl:glm_ocr", "vl:glmga", "vl:paddleocr_vl", "vl:qwen2_5_omni_thinker",
    ), _TIME_HEIGHT_WIDTH),
    "vl:glm4v_moe": {"text_config": {"head_dim": 16, "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1],
    }}},
    "vl:ernie4_5_vl_moe": {"text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]}}},
    "vl:glm5_next": {"text_config": {"num_key_value_heads": 4, "qk_rope_head_dim": 0, "index_kpool": 2}},
    "vl:chameleon": _IMAGE_WORD,
    "vl:emu3": _IMAGE_WORD,
    "vl:step3p7": {"text_config": {"sliding_window": 8}},
    "vl:mistral_large4": {"text_config": {"head_dim": 8, "num_key_value_heads": 4}},
}  # fmt: skip
"""By case: what its configuration says instead."""

VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gemma4!dense": ("gemma4_text", "Gemma4ForCausalLM", {**_GEMMA4, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0}),
    "gemma4!moe": (
        "gemma4_text", "Gemma4ForCausalLM",
        {**_GEMMA4, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    ),
    "ministral3!scaled": ("ministral3", "Ministral3ForCausalLM", {"rope_parameters": _YARN}),
    "vl:mistral3!ministral3": ("mistral3", "Mistral3ForConditionalGeneration", {"text_config": {"model_type": "ministral3"}}),
    "granitemoehybrid!attention": (
        "granitemoehybrid", "GraniteMoeHybridForCausalLM",
        {"layer_types": ["full_attention"] * 4, "num_local_experts": 0, "num_experts_per_tok": 0},
    ),
    "minimax_m3!sparse": ("minimax_m3_vl_text", "MiniMaxM3VLForCausalLM", _SPARSE),
    "minimax_m3!wide": ("minimax_m3_vl_text", "MiniMaxM3VLForCausalLM", {"index_block_size": 128, "index_topk_blocks": 16}),
    "vl:minimax_m3!sparse": ("minimax_m3_vl", "MiniMaxM3SparseForConditionalGeneration", {"text_config": _SPARSE}),
    "deepseek_v32!wide": ("deepseek_v32", "DeepseekV32ForCausalLM", {"index_topk": 2048}),
    "bert!encoder": ("bert", "BertLMHeadModel", {"is_decoder": False}),
    "qwen2!window": ("qwen2", "Qwen2ForCausalLM", _SWITCHED_WINDOWS),
    "qwen3!window": ("qwen3", "Qwen3ForCausalLM", _SWITCHED_WINDOWS),
    "qwen2_moe!window": ("qwen2_moe", "Qwen2MoeForCausalLM", _SWITCHED_WINDOWS),
    "qwen3_moe!window": ("qwen3_moe", "Qwen3MoeForCausalLM", {"use_sliding_window": True, "sliding_window": 8}),
    "smollm3!window": ("smollm3", "SmolLM3ForCausalLM", {"use_sliding_window": True, "sliding_window": 8}),
    "phimoe!window": ("phimoe", "PhimoeForCausalLM", {"sliding_window": 8}),
    "phi3!window": ("phi3", "Phi3ForCausalLM", {"sliding_window": 8}),
    "mixtral!window": ("mixtral", "MixtralForCausalLM", {"sliding_window": 8}),
    "mistral!window": ("mistral", "MistralForCausalLM", {"sliding_window": 8}),
    "starcoder2!window": ("starcoder2", "Starcoder2ForCausalLM", {"sliding_window": 8}),
    "doge!window": ("doge", "DogeForCausalLM", {"sliding_window": 8}),
}  # fmt: skip
"""Further cases: name -> (model type, class, overrides)."""
