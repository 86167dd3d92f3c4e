"""Between our tensors of fused experts and those of PEFT's `target_parameters` (its `ParamWrapper`, version 0.21).

PEFT lays the factors of all E experts side by side: A as E·r inputs, expert by expert; B as outputs r·E, rank by rank. Where several
parameters of one module are adapted, each wraps the one before, in the order in which the module has them, so the tensors of all but
the last stand under `base_layer`, once for each that follows.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from trimtab.core.errors import ArtifactError
from trimtab.methods._experts import MatrixShape, expert_shapes
from trimtab.methods._peft import PREFIX

IN_ORDER = ("gate_up_proj", "up_proj", "down_proj")
"""The parameters that fused experts have, in the order in which they have them."""
RENAMED = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
"""Modules by whose names PEFT means the experts of Transformers 4, wherever a mixture's `target_modules` have them."""
_NESTED = re.compile(rf"{re.escape(PREFIX)}(.+?)((?:\.base_layer)*)\.lora_([AB])\.weight")


def parameters_in_peft(own: Mapping[str, nn.Module], shapes: Mapping[str, MatrixShape]) -> dict[str, str]:
    """The matrices that PEFT has to be told of as `target_parameters`, and their names there.

    Besides experts, these are the linear layers of a mixture that it would take for experts by their names: a shared expert's.
    """
    is_mixture = any(expert_shapes(module) or _has_experts(module) for module in own.values())
    names = {path: path if shape.experts else f"{path}.weight" for path, shape in shapes.items()}
    return {p: name for p, name in names.items() if shapes[p].experts or (is_mixture and p.rpartition(".")[2] in RENAMED)}


def _has_experts(module: nn.Module) -> bool:
    """Whether it has matrices of experts, perhaps without Transformers' interface for them: PEFT asks the model's type alone."""
    return any(name in IN_ORDER and parameter.ndim == 3 for name, parameter in module.named_parameters(recurse=False))


def experts_to_peft(tensors: Mapping[str, Tensor], shapes: Mapping[str, MatrixShape]) -> dict[str, Tensor]:
    """Tensors by PEFT's names, where a matrix of experts is still by its own path, in PEFT's layout."""
    fused: dict[str, list[str]] = {}
    for path, shape in shapes.items():
        if shape.experts:
            module, _, name = path.rpartition(".")
            fused.setdefault(module, []).append(name)
    renamed = dict(tensors)
    for module, names in fused.items():
        for wraps, name in enumerate(reversed(sorted(names, key=IN_ORDER.index))):
            ours, theirs = f"{PREFIX}{module}.{name}", PREFIX + module + ".base_layer" * wraps
            renamed[f"{theirs}.lora_A.weight"] = renamed.pop(f"{ours}.lora_A.weight").flatten(0, 1)
            renamed[f"{theirs}.lora_B.weight"] = renamed.pop(f"{ours}.lora_B.weight").permute(1, 2, 0).flatten(1)
    return renamed


def experts_from_peft(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The reverse, by what the configuration says; and PEFT's name of each matrix among its `target_parameters`.

    Raises:
        ArtifactError: `target_parameters` does not say which parameters the tensors are of.
    """
    targets = config.get("target_parameters") or []
    renamed: dict[str, Tensor] = {}
    key_of: dict[str, str] = {}
    wraps: dict[str, set[int]] = {}
    matches = {key: match for key in tensors if targets and (match := _NESTED.fullmatch(key))}
    for match in matches.values():
        wraps.setdefault(match[1], set()).add(match[2].count(".base_layer"))
    for key, tensor in tensors.items():
        match = matches.get(key)
        names = (
            _targeted(match[1], targets) if match and not _is_targeted_module(match[1], config.get("target_modules")) else []
        )
        if match is None or not names:
            renamed[key] = tensor
            continue
        module, which = match[1], match[3]
        if wraps[module] != set(range(len(names))):
            raise ArtifactError(
                f"target_parameters names {len(names)} parameters of {module} ({', '.join(names)}), and there are tensors of "
                f"{len(wraps[module])}."
            )
        name = names[-1 - match[2].count(".base_layer")]
        path = module if name == "weight" else f"{module}.{name}"
        key_of[path] = f"{module}.{name}"
        if name != "weight":
            rank = match_pattern(config.get("rank_pattern"), key_of[path]) or config.get("r", 8)
            tensor = _by_expert(tensor, which, rank, key)
        renamed[f"{PREFIX}{path}.lora_{which}.weight"] = tensor
    if unknown := [target for target in targets if not any(_ends(key, target) for key in key_of.values())]:
        raise ArtifactError(
            f"adapter_config.json asks for what Trimtab does not do here: target_parameters: {targets!r}. There are no tensors for "
            f"{unknown[0]}, or it is neither a linear layer's weight nor one of fused experts."
        )
    return renamed, key_of


def _targeted(module: str, targets: list[str]) -> list[str]:
    """The parameters of a module that PEFT's `target_parameters` name, in their order."""
    return [name for name in ("weight", *IN_ORDER) if any(_ends(f"{module}.{name}", target) for target in targets)]


def _is_targeted_module(path: str, targets: list[str] | str | None) -> bool:
    """Whether PEFT's `target_modules`, names or one expression, mean the module itself, and so none of its parameters."""
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    return any(_ends(path, target) for target in targets or [])


def _ends(key: str, target: str) -> bool:
    return key == target or key.endswith(f".{target}")


def _by_expert(tensor: Tensor, which: str, rank: int, key: str) -> Tensor:
    """A as E r n, or B as E m r."""
    together = tensor.shape[0 if which == "A" else -1]
    if tensor.ndim != 2 or together % rank:
        raise ArtifactError(f"{key} has the shape {tuple(tensor.shape)}, which is not of experts with factors of rank {rank}.")
    if which == "A":
        return tensor.unflatten(0, (-1, rank)).contiguous()
    return tensor.unflatten(1, (rank, -1)).permute(2, 0, 1).contiguous()


def match_pattern(patterns: Mapping[str, Any] | None, path: str) -> Any:
    """What PEFT's `rank_pattern` or `alpha_pattern` says of a path, if anything."""
    return next((value for pattern, value in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", path)), None)
