"""A tiny random base model with a tokenizer and a chat template, the same in every process."""

from typing import Any

import torch

from trimtab.base import Base
from trimtab.core.randomness import seeded

PAD, START, END = SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCABULARY = len(SPECIAL) + 256
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_base(seed: int = 0) -> Base:
    """`tiny_model` with `tiny_tokenizer`: it reads and answers conversations, in random bytes until it is trained."""
    return Base(tiny_model(seed), tiny_tokenizer(), "tiny")


def tiny_model(seed: int = 0) -> Any:
    """A frozen Llama of two layers and 32,000 parameters, with weights large enough that a wrong mask, position or scale shows."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with seeded(seed), torch.no_grad():
        model: Any = LlamaForCausalLM(LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        ))  # fmt: skip
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.2)
    return model.eval().requires_grad_(False)


def tiny_tokenizer() -> Any:
    """A tokenizer with a token for each byte and three special ones, and ChatML's template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, bos_token=START, eos_token=END)
    fast.chat_template = CHATML
    return fast
