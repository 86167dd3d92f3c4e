"""Between our names and PEFT's: of tensors, of modules, and configurations that ask for more than we do."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from trimtab.core.errors import ArtifactError
from trimtab.core.wrapping import base_modules

PREFIX = "base_model.model."
"""What PEFT writes before a module's path."""

BASE_TENSOR_PREFIX = "base:"
"""What stands before the name of a tensor of the base's own, which PEFT saves beside an adapter of the embeddings or the head.

`from_peft` passes such tensors on, and whoever has the model checks that its base has the same.
"""
_BASE_TENSOR = re.compile(r"\.(base_layer|embed_tokens|lm_head)\.(weight|bias)$")

DESCRIPTIVE_KEYS = {"auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version"}
"""Keys of every PEFT configuration that do not change what an adapter computes."""
SELECTION_KEYS = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
"""Keys that say which modules are adapted; the names of the tensors say it exactly, and are read instead."""


def to_peft_names(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors by `path.name` under PEFT's names, `names` mapping ours to theirs."""
    renamed = {}
    for key, tensor in tensors.items():
        path, _, name = key.rpartition(".")
        renamed[f"{PREFIX}{path}.{names[name]}"] = tensor
    return renamed


def from_peft_names(
    tensors: Mapping[str, Tensor], names: Mapping[str, str], method: str
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The reverse of `to_peft_names`, and the paths of the adapted modules in the file's order.

    Tensors of the base's own come along under `BASE_TENSOR_PREFIX`.

    Raises:
        ArtifactError: There is no tensor, or one whose name is none of `names`, so it is not the method's.
    """
    renamed: dict[str, Tensor] = {}
    paths: dict[str, None] = {}
    for key, tensor in tensors.items():
        ours = next((n for n, theirs in names.items() if key.startswith(PREFIX) and key.endswith(f".{theirs}")), None)
        if ours is None and _BASE_TENSOR.search(key):
            renamed[BASE_TENSOR_PREFIX + key.removeprefix(PREFIX).replace(".base_layer.", ".")] = tensor
            continue
        if ours is None:
            raise ArtifactError(f"adapter_model.safetensors holds a tensor that is not {method}'s: {key}.")
        path = key.removeprefix(PREFIX).removesuffix(f".{names[ours]}")
        renamed[f"{path}.{ours}"] = tensor
        paths[path] = None
    if not paths:
        raise ArtifactError("adapter_model.safetensors holds no tensors.")
    return renamed, tuple(paths)


def check_peft_config(
    config: dict[str, Any],
    honoured: Iterable[str] = (),
    neutral: Mapping[str, tuple[Any, ...]] | None = None,
    ignored: Iterable[str] = (),
) -> None:
    """Refuse a PEFT configuration that asks for something this method does not do.

    Args:
        honoured: Keys that are read.
        neutral: Keys that are not, with the values that ask for nothing (besides None, False and empty).
        ignored: Keys that do not change what the adapter computes, besides `DESCRIPTIVE_KEYS`.
    """
    known = {*honoured, *ignored, *DESCRIPTIVE_KEYS, "peft_type"}
    neutral = {"task_type": ("CAUSAL_LM",), **(neutral or {})}
    unsupported = [
        f"{key}: {value!r}"
        for key, value in config.items()
        if key not in known and value not in (None, False, [], {}, "") and value not in neutral.get(key, ())
    ]
    if unsupported:
        raise ArtifactError(
            f"adapter_config.json asks for what Trimtab does not do here: {'; '.join(unsupported)}. "
            "Loading it anyway would give other outputs than PEFT's."
        )


def shortest_names(model: nn.Module, sites: list[str]) -> list[str]:
    """Names by which PEFT, which matches ends of paths, finds exactly `sites`: last parts where they suffice, else whole paths."""
    all_paths, wanted, names = list(base_modules(model)), set(sites), []
    for last in dict.fromkeys(path.rpartition(".")[2] for path in sites):
        matching = [path for path in all_paths if path == last or path.endswith(f".{last}")]
        names += [last] if wanted.issuperset(matching) else [path for path in sites if path.rpartition(".")[2] == last]
    return names
