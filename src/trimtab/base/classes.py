"""Which class of Transformers reads a checkpoint: a causal language model, or the whole multimodal wrapper around one."""

from typing import Any


def auto_class(config: dict[str, Any]) -> Any:
    """The automatic class that reads a checkpoint with this configuration whole.

    A multimodal checkpoint is read by the wrapper that its `architectures` names, even where Transformers would read its text model
    alone: else a merged model would have lost its vision tower.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM
    from transformers.models.auto import modeling_auto

    kind, architectures = str(config.get("model_type")), set(config.get("architectures") or ())
    causal = _names(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind))
    wrappers = _names(modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.get(kind))
    read_whole = not causal or not architectures or bool(architectures & wrappers)
    return AutoModelForMultimodalLM if wrappers and read_whole else AutoModelForCausalLM


def _names(registered: Any) -> set[str]:
    """Names of classes as Transformers registers them for a kind of model: one, several or none."""
    return {registered} if isinstance(registered, str) else set(registered or ())
