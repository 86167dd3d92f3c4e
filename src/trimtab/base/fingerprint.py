"""The fingerprint of a base: a hash each of its weights, configuration, tokenizer and chat template.

An adapter means the same on two bases with one fingerprint. The dtype counts: an adapter trained on a quantized or bfloat16
base has learned to correct that base's rounding.
"""

import ctypes
import hashlib
import json
import os
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from importlib.metadata import version
from typing import Any

from torch import Tensor, nn

from trimtab.base.quantized import quantization_identity
from trimtab.core import cache
from trimtab.core.wrapping import base_modules

Fingerprint = dict[str, str]
"""SHA-256 as hex, of each part: `weights`, `config`, `tokenizer`, `template`. A part that was not known at the time is missing."""

CONFIG_KEYS = (
    "model_type", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "hidden_activation", "activation_function",
    "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "rope_theta", "rope_parameters", "rope_scaling", "partial_rotary_factor",
    "sliding_window", "layer_types", "attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "logit_scale",
    "logits_scaling", "residual_multiplier", "embedding_multiplier", "attention_multiplier", "scale_attn_weights",
    "bitsandbytes",
)  # fmt: skip
"""Keys that change the outputs of a model with the same weights. A list, so that a new Transformers release changes no hash."""


def fingerprint(model: Any, weights: dict[str, Tensor], tokenizer: Any, switches: Mapping[str, Any]) -> Fingerprint:
    """The fingerprint of a base. Costs about half a second per GB of weights on two cores.

    Args:
        switches: Of the chat template, which change its tokens.
    """
    return {**model_fingerprint(model, weights), **tokenizer_identity(tokenizer, switches)}


def tokenizer_identity(tokenizer: Any, switches: Mapping[str, Any] | None = None) -> Fingerprint:
    """The parts of the fingerprint that identify the tokenizer and its chat template."""
    return {
        "tokenizer": _tokenizer_hash(tokenizer) if tokenizer is not None else "none",
        "template": _text_hash(_template_text(tokenizer, switches or {})),
    }


def model_fingerprint(model: Any, weights: dict[str, Tensor] | None = None) -> Fingerprint:
    """The parts of the fingerprint that identify the model."""
    weights = own_weights(model) if weights is None else weights
    config = model.config.to_dict() | quantization_identity(model)
    known: dict[str, Any] = {key: config[key] for key in CONFIG_KEYS if key in config}
    if (text := model.config.get_text_config()) is not model.config:  # a multimodal wrapper, whose own says little
        known["text"] = {key: value for key, value in text.to_dict().items() if key in CONFIG_KEYS}
    return {"weights": weights_hash(weights), "config": _text_hash(json.dumps(known, sort_keys=True, default=str))}


def weights_hash(named_weights: dict[str, Tensor]) -> str:
    """SHA-256 over the name, type, shape and bytes of every tensor, in the order of their names."""

    def tensor_hash(name: str) -> bytes:
        tensor = named_weights[name].detach()
        head = f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode()
        tensor = tensor.contiguous().cpu()
        # Not by way of numpy, after which a share of weights could not be freed beneath the views of it (Base.release).
        content = (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr()) if tensor.nbytes else b""
        return hashlib.sha256(head + hashlib.sha256(content).digest()).digest()

    names = sorted(named_weights)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:  # hashing releases the GIL
        return hashlib.sha256(b"".join(pool.map(tensor_hash, names))).hexdigest()


def own_weights(model: nn.Module) -> dict[str, Tensor]:
    """A model's own parameters and persistent buffers, without those of adapters on it; tied ones once, under their first name."""
    seen: set[int] = set()
    weights = {}
    for path, module in base_modules(model).items():
        children = {name for name, _ in module.named_children()}
        for name, tensor in module.state_dict(keep_vars=True, prefix=f"{path}." if path else "").items():
            inner = name.removeprefix(f"{path}.")
            if inner.partition(".")[0] not in children and id(tensor) not in seen:
                seen.add(id(tensor))
                weights[name] = tensor
    return weights


def tokenizing_hash(tokenizer: Any, switches: Mapping[str, Any], moment: datetime) -> str:
    """A hash of all that decides the tokens of a text or conversation: tokenizer, template with its switches, the moment if the template
    writes the date, and the code that applies them, ours and others'."""
    template = _template_text(tokenizer, switches)
    if writes_dates(tokenizer):
        template += moment.isoformat()
    versions = [f"{name} {version(name)}" for name in ("transformers", "tokenizers", "jinja2")]
    code = cache.code_hash(sys.modules[__package__])
    return _text_hash("\n".join([type(tokenizer).__name__, _tokenizer_hash(tokenizer), template, *versions, code]))


def writes_dates(tokenizer: Any) -> bool:
    """Whether the chat template renders a conversation differently on another day."""
    return "strftime_now" in str(getattr(tokenizer, "chat_template", None))


def _template_text(tokenizer: Any, switches: Mapping[str, Any]) -> str:
    template = getattr(tokenizer, "chat_template", None)
    named = dict(sorted(template.items())) if isinstance(template, dict) else template  # files have no order
    return str(named) + (json.dumps(switches, sort_keys=True) if switches else "")


def _tokenizer_hash(tokenizer: Any) -> str:
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for setting in ("truncation", "padding"):  # of the last call, not of the tokenizer
        state.pop(setting, None)
    state["special"] = {key: str(value) for key, value in sorted(tokenizer.special_tokens_map.items())}
    return _text_hash(json.dumps(state, sort_keys=True))


def _text_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
