"""Tiny random mixtures of experts, one of each form that Transformers' interface of experts has, with weights that show mistakes."""

import copy
from functools import cache

import torch
import transformers
from families import VOCABULARY
from torch import Tensor, nn

_COMMON = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False,
)  # fmt: skip

MIXTURES = {
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**_COMMON, num_local_experts=4, num_experts_per_tok=2)
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(**_COMMON, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=3)
    ),
    "gpt_oss": lambda: transformers.GptOssForCausalLM(  # transposed, biases, gate and up interleaved
        transformers.GptOssConfig(**_COMMON, num_local_experts=4, num_experts_per_tok=2, layer_types=["full_attention"] * 2)
    ),
    "olmoe": lambda: transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**_COMMON, num_experts=4, num_experts_per_tok=2)),
    "deepseek_v3": lambda: transformers.DeepseekV3ForCausalLM(  # a dense block, shared experts
        transformers.DeepseekV3Config(
            **_COMMON | {"num_key_value_heads": 4}, moe_intermediate_size=16, first_k_dense_replace=1, n_routed_experts=4,
            num_experts_per_tok=2, n_group=1, topk_group=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8,
            v_head_dim=8,
        )
    ),
    "nemotron_h": lambda: transformers.NemotronHForCausalLM(  # nothing gates; blocks of attention and of state spaces between
        transformers.NemotronHConfig(
            **_COMMON | {"num_hidden_layers": 4}, layers_block_type=["mamba", "moe", "attention", "moe"], moe_intermediate_size=16,
            moe_shared_expert_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
            mamba_num_heads=4, mamba_head_dim=16, ssm_state_size=8, n_groups=2, chunk_size=8, use_mamba_kernels=False,
        )
    ),
}  # fmt: skip


@cache
def _made(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MIXTURES[name]()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "norm" not in path and "A_log" not in path and "dt_bias" not in path and path.rpartition(".")[2] != "D":
                parameter.normal_(0, 0.2)
    return model.eval().requires_grad_(False)


def mixture(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return copy.deepcopy(_made(name)).to(dtype)


def experts_of(model: nn.Module) -> dict[str, nn.Module]:
    """The modules with fused experts by path."""
    return {path: module for path, module in model.named_modules() if hasattr(module, "is_concatenated")}


def one_by_one(
    own: nn.Module,
    weights: dict[str, Tensor],
    x: Tensor,
    chosen: Tensor,
    shares: Tensor,
    biases: dict[str, Tensor] | None = None,
) -> Tensor:
    """The experts' function written out, a token at a time, with matrices (E outputs inputs) by name: the reference of the layer."""
    rows = []
    if biases is None:
        biases = {name: getattr(own, f"{name}_bias") for name in weights} if own.has_bias else {}
    for token, experts, parts in zip(x, chosen, shares, strict=True):
        total = torch.zeros_like(token)
        for expert, share in zip(experts.tolist(), parts, strict=True):
            y = token
            for name, w in weights.items():
                y = w[expert] @ y
                if name in biases:
                    y = y + biases[name][expert]
                if name == "gate_up_proj" and type(own).__name__ == "GptOssExperts":
                    gate, up = y[::2].clamp(max=own.limit), y[1::2].clamp(-own.limit, own.limit)
                    y = (up + 1) * gate * torch.sigmoid(gate * own.alpha)
                elif name == "gate_up_proj":
                    y = nn.functional.silu(y[: len(y) // 2]) * y[len(y) // 2 :]
                elif name == "up_proj":
                    y = y.relu() ** 2
            total = total + share * y
        rows.append(total)
    return torch.stack(rows)
