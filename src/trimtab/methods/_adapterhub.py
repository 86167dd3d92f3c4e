"""The layout of the `adapters` library (AdapterHub; Poth et al. 2023, arXiv:2311.11077), which reads bottleneck adapters.

A folder of its has `adapter_config.json`, whose `config` is the adapter's, and `adapter.safetensors`, whose tensors are
`<block>.attention_adapters.adapters.<name>.adapter_down.0.weight` and so on. Written for version 1.3.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from trimtab.core.errors import ArtifactError

NAME = "trimtab"
"""The adapter's name in folders of ours."""
ATTENTION, OUTPUT = "attention_adapters", "output_adapters"
"""What the library calls adapters after attention and after the MLP."""
MATRICES = {"down": "adapter_down.0", "up": "adapter_up"}
"""Its names of our two matrices."""
ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "silu": "silu", "tanh": "tanh"}
_OUR_ACTIVATIONS = {theirs: ours for ours, theirs in ACTIVATIONS.items()} | {"swish": "silu", "gelu_new": "gelu_tanh"}
_ATTENTION_OUTPUTS = {"gpt2": "attn.c_proj", "phi": "self_attn.dense"}
"""What attention ends with in those of its architectures where that is not self_attn.o_proj."""

_KEY = re.compile(rf"(.+)\.({ATTENTION}|{OUTPUT})\.adapters\.[^.]+\.(adapter_down\.0|adapter_up)\.(weight|bias)")
_REQUIRED: dict[str, Any] = {
    "original_ln_before": False,  # else it reads the sum with the residual
    "original_ln_after": True,  # else there is no residual
    "output_adapter": True,
    "is_parallel": False,  # it reads the residual stream before the norm, not what the MLP reads
    "cross_adapter": False,
    "ln_before": False,
    "ln_after": False,
    "use_gating": False,
    "phm_layer": False,
    "inv_adapter": None,
    "leave_out": [],
    "stochastic_depth": 0.0,
}
"""What a configuration may ask for, of the keys that change what is computed; the library's defaults but for the last."""
_IGNORED = re.compile(
    "reduction_factor|init_weights(_seed)?|dropout|residual_before_ln|adapter_residual_before_ln|inv_adapter_reduction_factor|"
    ".*phm_.*|.*_phm|hypercomplex_nonlinearity"
)
"""Sizes that the tensors say, what acts in training alone, and what is read with other keys alone."""


def to_adapterhub(
    model: Any, method: Mapping[str, Any], insertion_points: Mapping[str, tuple[str, str]], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The content of `adapter_config.json`, and the tensors under the library's names.

    Args:
        method: Its hyperparameters by our names.
        insertion_points: By the path of an adapted module, its block's, and ATTENTION or OUTPUT.
        tensors: By `path.down.weight` and so on.
    """
    hidden = model.config.get_text_config().hidden_size
    config = {
        "model_type": model.config.get_text_config().model_type,
        "model_class": type(model).__name__,
        "hidden_size": hidden,
        "name": NAME,
        "version": "adapters.1.3.0",
        "peft_type": "TRIMTAB_BOTTLENECK",  # for PEFT, which has no such method, to refuse it by name
        "config": {
            **_REQUIRED,
            "mh_adapter": method["kind"] == "houlsby",
            "non_linearity": ACTIVATIONS[method["activation"]],
            "reduction_factor": _reduction(hidden, method["width"]),
            "scaling": method["scale"],
        },
    }
    defaults = _default_paths(config)
    # For us alone: modules whose paths are not the default ones.
    config["modules"] = {
        f"{b}.{where}": path for path, (b, where) in insertion_points.items() if path != f"{b}.{defaults[where]}"
    }
    renamed = {}
    for key, tensor in tensors.items():
        path, matrix, kind = key.rsplit(".", 2)
        block, where = insertion_points[path]
        renamed[f"{block}.{where}.adapters.{NAME}.{MATRICES[matrix]}.{kind}"] = tensor
    return config, renamed


def from_adapterhub(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Hyperparameters by our names, and tensors by `path.down.weight` and so on: the reverse of `to_adapterhub`.

    Raises:
        ArtifactError: Trimtab would compute something else than the library does.
    """
    settings, modules, defaults = config.get("config"), config.get("modules", {}), _default_paths(config)
    if not isinstance(settings, dict) or not isinstance(modules, dict):
        raise ArtifactError("adapter_config.json does not describe the adapter: its `config` and `modules` must be mappings.")
    asked = {"non_linearity": None, **settings}
    if unsupported := [f"{key}: {value!r}" for key, value in asked.items() if not _is_supported(key, value)]:
        raise ArtifactError(
            f"adapter_config.json asks for what Trimtab does not do here: {'; '.join(unsupported)}. A bottleneck adapter of the "
            "`adapters` library is read if it stands after attention and the MLP, or after the MLP, with original_ln_before=False: its "
            "double_seq_bn, for example."
        )
    ours = {theirs: name for name, theirs in MATRICES.items()}
    renamed, widths = {}, set()
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None or tensor.ndim == 0:
            raise ArtifactError(f"adapter.safetensors holds a tensor that is not a bottleneck adapter's: {key}.")
        block, where, matrix, kind = match.groups()
        path = modules.get(f"{block}.{where}", f"{block}.{defaults[where]}")
        renamed[f"{path}.{ours[matrix]}.{kind}"] = tensor
        widths |= {len(tensor)} if ours[matrix] == "down" else set()
    if len(widths) != 1:
        raise ArtifactError(f"adapter.safetensors holds bottlenecks of {len(widths)} widths ({sorted(widths)}), not of one.")
    method = {
        "kind": "houlsby" if settings.get("mh_adapter") else "pfeiffer",
        "width": widths.pop(),
        "activation": _OUR_ACTIVATIONS[settings["non_linearity"]],
        "scale": settings.get("scaling", 1.0),
    }
    return method, renamed


def _default_paths(config: Mapping[str, Any]) -> dict[str, str]:
    """The module at each of the two places, by its path within a block."""
    return {ATTENTION: _ATTENTION_OUTPUTS.get(str(config.get("model_type")), "self_attn.o_proj"), OUTPUT: "mlp"}


def _is_supported(key: str, value: Any) -> bool:
    if key in _REQUIRED:
        return bool(value == _REQUIRED[key])
    honoured = {"mh_adapter": isinstance(value, bool), "scaling": isinstance(value, float), "architecture": value is None}
    honoured["non_linearity"] = str(value) in _OUR_ACTIVATIONS
    return honoured[key] if key in honoured else bool(_IGNORED.fullmatch(key))


def _reduction(hidden: int, width: int) -> float:
    """The factor from which the library, by int(hidden // factor), computes this width."""
    factor = hidden / width
    return factor if int(hidden // factor) == width else math.nextafter(factor, 0)
