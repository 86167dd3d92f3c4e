"""Tiny random models of the kinds that are no plain stack of attention and MLPs: state, sinks, local masks, several calls a layer."""

import torch
import transformers
from torch import nn

from trimtab.data.example import TokenRow

VOCABULARY = 97
_COMMON = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
_DELTA = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=16)
_MAMBA = dict(mamba_d_state=8, mamba_d_head=8, mamba_n_heads=8, mamba_chunk_size=8, mamba_n_groups=1)
_EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
_MLA = dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=4)
_HYBRID = ["linear_attention", "full_attention"] * 2
_LOCAL = ["sliding_attention", "full_attention"] * 2
WINDOW = 8


def _of(name: str, **settings: object) -> nn.Module:
    """A causal language model of this family, by Transformers' names of its classes."""
    model, config = getattr(transformers, f"{name}ForCausalLM"), {**_COMMON, **settings}
    return model(model.config_class(**{key: value for key, value in config.items() if value is not None}))


KINDS = {
    "gated DeltaNet": lambda: _of("Qwen3_5", head_dim=16, **_DELTA, layer_types=_HYBRID),
    "gated DeltaNet, experts": lambda: _of(
        "Qwen3Next", head_dim=16, **_DELTA, **_EXPERTS, shared_expert_intermediate_size=16, layer_types=_HYBRID
    ),
    "KDA": lambda: _of(
        "KimiLinear", **_MLA, num_key_value_heads=4, linear_num_heads=4, linear_head_dim=8, n_routed_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=16, layer_types=_HYBRID,
    ),
    "Mamba 2": lambda: _of(
        "GraniteMoeHybrid", **_MAMBA, layer_types=_HYBRID, num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=16,
        logits_scaling=3.0,
    ),
    "Mamba 2 with limits": lambda: _of(
        "NemotronH", num_hidden_layers=None, mamba_num_heads=8, mamba_head_dim=8, ssm_state_size=8, n_groups=1, chunk_size=8,
        time_step_min=0.4, layers_block_type=["linear_attention", "full_attention", "mlp", "linear_attention"],
    ),
    "Mamba 2 beside attention": lambda: _of("FalconH1", mamba_d_ssm=64, lm_head_multiplier=0.4, **_MAMBA),
    "Mamba 1": lambda: _of(
        "Jamba", num_experts=4, num_experts_per_tok=2, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
        expert_layer_offset=1, mamba_d_state=8, mamba_dt_rank=8,
    ),
    "state alone": lambda: transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8, state_size=8,
                                  n_groups=1, chunk_size=8, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    ),
    "short convolution": lambda: _of("Lfm2", layer_types=["conv", "full_attention"] * 2),
    "sinks": lambda: _of(
        "GptOss", head_dim=8, sliding_window=WINDOW, num_local_experts=4, num_experts_per_tok=2, layer_types=_LOCAL
    ),
    "a window that masks alone say": lambda: _of(
        "Qwen2Moe", use_sliding_window=True, sliding_window=WINDOW, layer_types=_LOCAL, **_EXPERTS, shared_expert_intermediate_size=16
    ),
    "two attentions a layer": lambda: _of("DiffLlama"),
    "layers that run several times": lambda: _of("HrmText", num_layers_per_stack=2, num_key_value_heads=4, head_dim=8, num_hidden_layers=None),
    "masks with learned numbers": lambda: _of("Doge", sliding_window=WINDOW),
    "chunks, counted tokens": lambda: _of(
        "Llama4", head_dim=8, attention_chunk_size=WINDOW, num_local_experts=2, num_experts_per_tok=1, intermediate_size_mlp=48,
        floor_scale=WINDOW,
    ),
    "a head that multiplies": lambda: _of("HyperCLOVAX", logits_scaling=0.3),
    "MLA": lambda: _of(
        "DeepseekV3", **_MLA, num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        moe_intermediate_size=16, first_k_dense_replace=1,
    ),
    "head sizes by layer, shared keys": lambda: _of(
        "Gemma4", head_dim=8, global_head_dim=16, layer_types=_LOCAL, num_kv_shared_layers=2, sliding_window=WINDOW,
        hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCABULARY,
    ),
    "an attention output that is viewed": lambda: _of("Afmoe", **_EXPERTS, num_dense_layers=1, head_dim=8, sliding_window=WINDOW),
}  # fmt: skip


def kind(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model of the kind, with numbers large enough that a wrong state, mask or scale shows."""
    torch.manual_seed(0)
    model = KINDS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    if dtype == torch.float64:
        model.set_experts_implementation("eager")  # grouped products have no float64
    return model.eval().requires_grad_(False).to(dtype)


def branching_rows() -> list[TokenRow]:
    """Rows longer than every window and chunk of these models; three of them begin alike."""
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, VOCABULARY, (n,), generator=draw).tolist() for n in (21, 17, 9, 30, 3, 11)]
    rows = [ids[0] + ids[1], ids[0] + ids[2], ids[3], ids[4], ids[0] + ids[1][:8] + ids[5]]
    return [TokenRow(row, list(range(max(1, len(row) // 3), len(row))), f"row:{n}") for n, row in enumerate(rows)]
