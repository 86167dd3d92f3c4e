"""Which models can be trained exactly, and the reason when one can't.

Trimtab packs many rows into one and attends through Transformers' attention interface, so it needs a model whose tokens
interact in that attention only. `engine.check_packing` measures this on the model itself.
"""

from typing import Any

from trimtab.base.quantized import refuse_unknown_quantization
from trimtab.core.errors import UnsupportedModel

LAYER_TYPES = {"full_attention", "sliding_attention"}
"""The kinds of layer that keep the rows of a pack independent."""


def refuse_unsupported(model: Any, tokenizer: Any) -> None:
    """Raise UnsupportedModel, with the reason, for a model or tokenizer that Trimtab can't train exactly."""
    from transformers import PreTrainedModel

    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModel(f"{name} is not a Transformers model.")
    if "peft_config" in vars(model):
        raise UnsupportedModel(f"{name} has a PEFT adapter on it; remove it first (unload), or load the model again.")
    refuse_unknown_quantization(model)
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{name} is an encoder-decoder model; Trimtab trains causal language models.")
    if model.get_output_embeddings() is None:
        raise UnsupportedModel(f"{name} has no language model head; load it with AutoModelForCausalLM.")
    if not getattr(model, "_supports_attention_backend", False):
        raise UnsupportedModel(
            f"{name} does not use Transformers' attention interface, so packed examples would attend to each other."
        )
    unsupported = set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES
    if unsupported:
        raise UnsupportedModel(
            f"{name} has layers of the kind {', '.join(sorted(unsupported))}, which carry state from one example of a pack to the next."
        )
    if tokenizer is not None and not getattr(tokenizer, "is_fast", False):
        raise UnsupportedModel(
            f"{type(tokenizer).__name__} cannot tell which characters a token stands for, so target tokens cannot be found exactly. "
            "Convert it to a fast tokenizer (tokenizer.json)."
        )


def context_length(model: Any) -> int | None:
    """How many tokens an example may have, if the model's configuration says so.

    Where rotary frequencies change with the longest row of a batch (Phi-3's longrope), it is the length up to which they
    don't: a longer row would change the positions of the others in its pack.
    """
    config = model.config.get_text_config()
    rotary = getattr(config, "rope_parameters", None) or {}
    if rotary.get("rope_type") in ("dynamic", "longrope"):
        first = rotary.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
        return first or config.max_position_embeddings
    return getattr(config, "max_position_embeddings", None)
