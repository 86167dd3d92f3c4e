"""Tiny random models of every family that Trimtab promises to train, each with its own peculiarity switched on."""

import torch
import transformers
from torch import Tensor, nn

from trimtab.methods import Method

VOCABULARY = 97

_COMMON = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=2,
)  # fmt: skip

FAMILIES = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**_COMMON)),
    "llama-tied": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**_COMMON, tie_word_embeddings=True)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**_COMMON)),  # biases on q, k, v
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_COMMON, head_dim=16)),  # norms on q, k
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**_COMMON, sliding_window=4)),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(  # soft-caps, alternate sliding windows
        transformers.Gemma2Config(
            **_COMMON,
            head_dim=8,
            sliding_window=4,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
            attn_implementation="eager",  # before Transformers 5.23 its others leave the cap out
        )
    ),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(  # two rotary bases, sliding and full layers
        transformers.Gemma3TextConfig(
            **_COMMON,
            head_dim=8,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention"],
            query_pre_attn_scalar=8,
        )
    ),
    "phi3": lambda: transformers.Phi3ForCausalLM(transformers.Phi3Config(**_COMMON)),  # fused q, k, v and gate, up
    "gpt2": lambda: transformers.GPT2LMHeadModel(  # Conv1D, learned positions
        transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
        )
    ),
    "granite": lambda: transformers.GraniteForCausalLM(
        transformers.GraniteConfig(
            **_COMMON, logits_scaling=4.0, residual_multiplier=0.5, embedding_multiplier=3.0, attention_multiplier=0.4
        )
    ),
    "cohere": lambda: transformers.CohereForCausalLM(transformers.CohereConfig(**_COMMON, logit_scale=0.25)),
}


def tiny(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """A model of the family with weights large enough that a wrong mask, position or scale shows."""
    torch.manual_seed(seed)
    model = FAMILIES[family]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name and "ln_" not in name:
                parameter.normal_(0, 0.2)
    return model.eval().requires_grad_(False).to(dtype)


def random_rows(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def perturb(tensors: dict[str, nn.Parameter], size: float = 0.2, seed: int = 0) -> None:
    """Move an adapter off its first values, where B is zero and half of the gradients are too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.add_(size * torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype))


def logprob_alone(model: nn.Module, ids: list[int], learned: list[int]) -> Tensor:
    """Σ log p of the learned tokens by the model's own forward pass on the row alone: the reference for packed rows."""
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    kind = torch.promote_types(logits.dtype, torch.float32)
    logprobs = logits.to(kind).log_softmax(-1)
    return torch.stack([logprobs[t - 1, ids[t]] for t in learned]).sum()


NEEDED = {"tokens": {"tokens": list(range(3, VOCABULARY, 2))}, "miss": {"rank": 12}, "oft": {"block_size": 16}}
"""Settings that a method can't do without, on the tiny models at least."""


def method_of(name: str) -> Method:
    """A method by name, as it is by default; or with what it can't do without, or what the tiny models can't hold."""
    return Method.member(name)(**NEEDED.get(name, {}))


def exact_norms(monkeypatch) -> None:
    """Let the families' norms compute in the type they are given, where they would in float32: for comparisons in float64."""

    def plain(self, x):
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))

    def shifted(self, x):
        return (1.0 + self.weight) * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))

    for name, forward in (
        ("llama.modeling_llama.LlamaRMSNorm", plain), ("qwen2.modeling_qwen2.Qwen2RMSNorm", plain),
        ("qwen3.modeling_qwen3.Qwen3RMSNorm", plain), ("mistral.modeling_mistral.MistralRMSNorm", plain),
        ("phi3.modeling_phi3.Phi3RMSNorm", plain), ("granite.modeling_granite.GraniteRMSNorm", plain),
        ("gemma2.modeling_gemma2.Gemma2RMSNorm", shifted), ("gemma3.modeling_gemma3.Gemma3RMSNorm", shifted),
    ):  # fmt: skip
        monkeypatch.setattr(f"transformers.models.{name}.forward", forward)


def recomputing(model, arguments=None):
    """Turn the model's gradient checkpointing on, by the name that this version of Transformers has for it."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)(arguments)
