"""Which models can be trained exactly, and the reason when one can't.

Trimtab packs many rows into one. It needs a model whose tokens interact through Transformers' attention interface, or through
the states that Transformers' cache holds. `engine.check_packing` measures on the model itself that they interact in no other way.
"""

from typing import Any
from weakref import WeakKeyDictionary

from trimtab.base.quantized import refuse_unknown_quantization
from trimtab.core.attention_hook import uses_interface
from trimtab.core.errors import UnsupportedModel
from trimtab.core.stateful import carries_state, updates_state

STATES_SINCE = (5, 21)
"""The version of Transformers from which on layers that carry state ask its cache for it by methods."""


def refuse_unsupported(model: Any, tokenizer: Any) -> None:
    """Raise UnsupportedModel, with the reason, for a model or tokenizer that Trimtab can't train exactly."""
    from transformers import PreTrainedModel, __version__

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
    states = next((type(module).__name__ for module in model.modules() if updates_state(type(module))), None)
    if states and tuple(int(part) for part in __version__.split(".")[:2]) < STATES_SINCE:
        raise UnsupportedModel(
            f"{name} has layers that carry state ({states}), which are supported from Transformers "
            f"{'.'.join(map(str, STATES_SINCE))} on; this is {__version__}: pip install -U transformers"
        )
    if not any(uses_interface(type(module)) for module in model.modules()) and not carries_state(model):
        raise UnsupportedModel(
            f"{name} does not use Transformers' attention interface, so packed examples would attend to each other."
        )
    if tokenizer is not None and not getattr(tokenizer, "is_fast", False):
        raise UnsupportedModel(
            f"{type(tokenizer).__name__} cannot tell which characters a token stands for, so target tokens cannot be found exactly. "
            "Convert it to a fast tokenizer (tokenizer.json)."
        )


def context_length(model: Any) -> int | None:
    """How many tokens an example may have, if the model's configuration says so.

    Where rotary frequencies change with the longest row of a batch (Phi-3's longrope), it is the length up to which they
    don't: a longer row would change the positions of the others in its pack. Where an indexer chooses what tokens attend to, it
    is the length up to which it chooses all of a row.
    """
    limits = [_positions(model.config.get_text_config()), _row_limits.get(model)]
    return min((limit for limit in limits if limit is not None), default=None)


_row_limits: WeakKeyDictionary[Any, int] = WeakKeyDictionary()


def limit_rows(model: Any, tokens: int) -> None:
    """From now on, `context_length` of this model is at most so many tokens: the most of a row that packs compute exactly."""
    _row_limits[model] = tokens


def _positions(config: Any) -> int | None:
    rotary = getattr(config, "rope_parameters", None) or {}
    if rotary.get("rope_type") in ("dynamic", "longrope"):
        first = rotary.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
        return first or config.max_position_embeddings
    return getattr(config, "max_position_embeddings", None)
