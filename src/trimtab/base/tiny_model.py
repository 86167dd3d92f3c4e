"""A tiny random model, for self-tests that need a model of any kind."""

from typing import Any

import torch

from trimtab.core.randomness import seeded

VOCABULARY = 89


def tiny_model() -> Any:
    """A random Llama of two layers, with weights large enough to expose a wrong mask, position or scale."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with seeded(0), torch.no_grad():
        model: Any = LlamaForCausalLM(LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=2,
        ))  # fmt: skip
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.2)
    return model.eval().requires_grad_(False)
