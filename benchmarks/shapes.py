"""Random models of today's shapes, small enough for a CPU, to compare training speed with the peers on:

    python benchmarks/shapes.py qwen3.5 /tmp/qwen3.5
    python benchmarks/peers --model /tmp/qwen3.5

qwen3.5: 24 layers, three of gated DeltaNet to one of attention, hidden size 256. gpt-oss: 12 layers of attention with sinks, every
other one in a window of 128 tokens, and 8 experts, of which a token takes 4. Both read text by the embedded SmolLM2's tokenizer.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
import transformers

from trimtab.base import Base, ModelConfig

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3.5": {
        "class": "Qwen3_5ForCausalLM", "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 24, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 32,
        "linear_value_head_dim": 32, "layer_types": [*3 * ["linear_attention"], "full_attention"] * 6,
    },
    "gpt-oss": {
        "class": "GptOssForCausalLM", "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 12, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 32, "sliding_window": 128, "num_local_experts": 8, "num_experts_per_tok": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 6,
    },
}  # fmt: skip


def make(shape: str, folder: Path) -> None:
    """Write a random model of this shape as a folder that Transformers loads."""
    tokenizer = Base.load(ModelConfig(name="smollm2-135m-instruct")).tokenizer
    settings = dict(SHAPES[shape])
    kind = getattr(transformers, settings.pop("class"))
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = kind.config_class(
        **settings, **ids, vocab_size=len(tokenizer), max_position_embeddings=4096, tie_word_embeddings=True
    )
    torch.manual_seed(0)
    kind(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    make(arguments.shape, arguments.folder)
