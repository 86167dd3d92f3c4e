"""Between our words and PEFT's: names of tensors, names of modules, and configurations that ask for more than we do."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from trimtab.core.errors import ArtifactError

PREFIX = "base_model.model."
"""What PEFT writes before a module's path."""

OF_BASE = "base:"
"""What stands before the name of a tensor of the base's own, which PEFT saves beside an adapter of the embeddings or the head.

`from_peft` hands such tensors on, and whoever has the model sees that its base has the same.
"""
_BASES_OWN = re.compile(r"\.(base_layer|embed_tokens|lm_head)\.(weight|bias)$")

DESCRIPTIVE = {"auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version"}
"""Keys of every PEFT configuration that do not change what an adapter computes."""
SELECTING = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
"""Keys that say which modules are adapted; that is read off the tensors instead, which say it exactly."""


def not_pefts(name: str) -> dict[str, Any]:
    """The configuration of an adapter that PEFT cannot represent: PEFT refuses it by this name, and our manifest has it all."""
    return {"peft_type": f"TRIMTAB_{name.upper()}", "task_type": "CAUSAL_LM", "inference_mode": True}


def to_names(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors by `path.name` under PEFT's names, `names` mapping ours to theirs."""
    renamed = {}
    for key, tensor in tensors.items():
        path, _, name = key.rpartition(".")
        renamed[f"{PREFIX}{path}.{names[name]}"] = tensor
    return renamed


def from_names(tensors: Mapping[str, Tensor], names: Mapping[str, str], what: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The reverse of `to_names`, and the paths of the adapted modules in the file's order; with tensors `OF_BASE`, if there are any.

    Raises:
        ArtifactError: There is no tensor, or one whose name is none of `names`.
    """
    renamed: dict[str, Tensor] = {}
    paths: dict[str, None] = {}
    for key, tensor in tensors.items():
        ours = next((n for n, theirs in names.items() if key.startswith(PREFIX) and key.endswith(f".{theirs}")), None)
        if ours is None and _BASES_OWN.search(key):
            renamed[OF_BASE + key.removeprefix(PREFIX).replace(".base_layer.", ".")] = tensor
            continue
        if ours is None:
            raise ArtifactError(f"adapter_model.safetensors holds a tensor that is not {what}'s: {key}.")
        path = key.removeprefix(PREFIX).removesuffix(f".{names[ours]}")
        renamed[f"{path}.{ours}"] = tensor
        paths[path] = None
    if not paths:
        raise ArtifactError("adapter_model.safetensors holds no tensors.")
    return renamed, tuple(paths)


def only_known(config: dict[str, Any], honoured: set[str], neutral: dict[str, tuple[Any, ...]], ignored: set[str]) -> None:
    """Refuse a PEFT configuration that asks for something this method does not do.

    Args:
        honoured: Keys that are read.
        neutral: Keys that are not, with the values that ask for nothing (besides None, False and empty).
        ignored: Keys that do not change what the adapter computes, besides `DESCRIPTIVE`.
    """
    known = honoured | ignored | DESCRIPTIVE | {"peft_type"}
    neutral = {"task_type": ("CAUSAL_LM",), **neutral}
    asked = [
        f"{key}: {value!r}"
        for key, value in config.items()
        if key not in known and value not in (None, False, [], {}, "") and value not in neutral.get(key, ())
    ]
    if asked:
        raise ArtifactError(
            f"adapter_config.json asks for what Trimtab does not do here: {'; '.join(asked)}. "
            "Loading it anyway would give other outputs than PEFT's."
        )


def shortest_names(sites: list[str], all_paths: list[str]) -> list[str]:
    """Names by which PEFT, which matches ends of paths, finds exactly `sites`: last parts where they suffice, else whole paths."""
    wanted, names = set(sites), []
    for last in dict.fromkeys(path.rpartition(".")[2] for path in sites):
        matching = [path for path in all_paths if path == last or path.endswith(f".{last}")]
        names += [last] if wanted.issuperset(matching) else [path for path in sites if path.rpartition(".")[2] == last]
    return names
