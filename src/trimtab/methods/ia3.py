"""(IA)³: learned vectors that scale keys, values and the inner activations of feed-forward layers.

Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
arXiv:2205.05638, section 3.3.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from trimtab.errors import NoSuchModule, RecipeError
from trimtab.methods._base import AdapterLayer, Circumstances, Method, matrix_shape, modules, wide, with_weight
from trimtab.methods._peft import SELECTING, from_names, only_known, shortest_names, to_names
from trimtab.methods._targets import ALL_LINEAR, ATTENTION, ATTENTION_NAMES, Patterns, matches, matrices

AUTO = "auto"
"""The target that is found from the model's structure."""
KEYS_VALUES = re.compile(r"(k|v|key|value)(_proj)?|c_attn|qkv(_proj)?|query_key_value|Wqkv")
"""What attention modules call the matrices that make keys and values, alone or together with queries."""
NAMES = {"scale": "ia3_l"}
"""PEFT's name of ours."""


class IA3(Method):
    """Multiplies what some matrices give, and what some others take, by learned vectors, which start as ones."""

    peft_type: ClassVar[str | None] = "IA3"

    outputs: Patterns = (AUTO,)
    """Matrices whose outputs are scaled: `auto` (keys and values), names such as `v_proj`, or regular expressions over whole paths.

    Where one matrix makes queries, keys and values (GPT-2, Phi-3), `auto` scales all that it gives, as PEFT does: to scale a
    number of a query is to scale the number of the key that it is multiplied by.
    """
    inputs: Patterns = (AUTO,)
    """Matrices whose inputs are scaled: `auto` (the last of each feed-forward layer), or names and expressions in the same way."""

    def sizes(self, model: nn.Module) -> dict[str, int]:
        """path -> how many numbers are scaled, in the model's order. Raises RecipeError, NoSuchModule."""
        outputs = _chosen(model, self.outputs, "outputs", _keys_values)
        inputs = _chosen(model, self.inputs, "inputs", _last_of_feed_forward)
        if both := outputs.keys() & inputs.keys():
            raise RecipeError(f"inputs: {min(both)} is among `outputs` too, and a matrix is scaled on one side only.")
        if not outputs and not inputs:
            raise RecipeError("outputs and inputs are both empty, so there is nothing to scale.")
        found = {path: gives for path, (_, gives) in outputs.items()} | {path: takes for path, (takes, _) in inputs.items()}
        return {path: found[path] for path in modules(model) if path in found}

    def sites(self, model: nn.Module) -> list[str]:
        return list(self.sizes(model))

    def layer(self, base: nn.Module, path: str) -> "IA3Layer":
        """A site is among the outputs or the inputs, and not among both, so the outputs' patterns tell which."""
        of_group = {AUTO: _makes_keys_or_values(path), ALL_LINEAR: True, ATTENTION: _in_attention(path)}
        on_outputs = any(of_group[one] if one in of_group else matches(one, path) for one in self.outputs)
        return (OutputScale if on_outputs else InputScale)(base)

    def parameter_count(self, model: nn.Module) -> int:
        """Σ outputs over the matrices whose outputs are scaled + Σ inputs over those whose inputs are."""
        return sum(self.sizes(model).values())

    def learning_rate(self, at: Circumstances) -> tuple[float, str]:
        """1e-2, by a small search: see docs/methods.md."""
        return 1e-2, "1e-2"

    def to_peft(self, model: nn.Module, tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        everything, sites = modules(model), self.sites(model)
        scaled = {path: self.layer(everything[path], path) for path in sites}
        inputs = [path for path, layer in scaled.items() if isinstance(layer, InputScale)]
        outputs = [path for path in sites if path not in inputs]
        names = shortest_names(inputs, list(everything))
        if any(path.endswith(tuple(names)) for path in outputs):
            names = inputs  # PEFT compares these with the ends of paths, letter by letter
        config = {
            "peft_type": self.peft_type,
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "target_modules": [*shortest_names(outputs, list(everything)), *names],
            "feedforward_modules": names,
            "fan_in_fan_out": any(not isinstance(everything[path], nn.Linear) for path in sites),
        }
        shaped = {key: t[None] if key.rpartition(".")[0] in inputs else t[:, None] for key, t in tensors.items()}
        return config, to_names(shaped, NAMES)

    @classmethod
    def from_peft(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[Self, dict[str, Tensor]]:
        only_known(
            config,
            honoured=set(),
            neutral={},
            ignored={"feedforward_modules", "fan_in_fan_out", "init_ia3_weights", *SELECTING},
        )
        renamed, paths = from_names(tensors, NAMES, "(IA)³")
        outputs = [path for path in paths if renamed[f"{path}.scale"].shape[-1:] == (1,)]  # the others' are (1, inputs)
        method = cls.parse({"outputs": outputs, "inputs": [path for path in paths if path not in outputs]})
        return method, {name: t.flatten() for name, t in renamed.items()}


class OutputScale(AdapterLayer):
    """y = scale ⊙ base(x)."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        self.scale = _ones(base, 1)

    def adapt(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return (y * self.scale).to(y.dtype)  # not in the base's few bits, where the scale could hardly leave 1

    @torch.no_grad()
    def merged(self) -> nn.Module:
        made: Any = with_weight(self.base, lambda weight: self.scale[:, None] * weight)
        if made.bias is not None:
            made.bias = nn.Parameter(self.scale * made.bias, requires_grad=False)
        return made


class InputScale(AdapterLayer):
    """y = base(scale ⊙ x)."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        self.scale = _ones(base, 0)

    def adapt(self, x: Tensor) -> Tensor:
        return self.base((x * self.scale).to(x.dtype))

    @torch.no_grad()
    def merged(self) -> nn.Module:
        return with_weight(self.base, lambda weight: self.scale * weight)


def _ones(base: nn.Module, side: int) -> nn.Parameter:
    shape = matrix_shape(base)
    assert shape is not None, f"{type(base).__name__} is not a matrix"
    return nn.Parameter(torch.ones(shape[side], dtype=wide(next(base.parameters()))))


def _chosen(
    model: nn.Module, patterns: Sequence[str], key: str, auto: Callable[[nn.Module], list[str]]
) -> dict[str, tuple[int, int]]:
    targets = [target for one in patterns for target in (auto(model) if one == AUTO else [one])]
    return matrices(model, targets, key=key) if targets else {}


def _in_attention(path: str) -> bool:
    return not ATTENTION_NAMES.isdisjoint(path.split("."))


def _makes_keys_or_values(path: str) -> bool:
    return _in_attention(path) and bool(KEYS_VALUES.fullmatch(path.rpartition(".")[2]))


def _keys_values(model: nn.Module) -> list[str]:
    found = [path for path in matrices(model, [ATTENTION], key="outputs") if _makes_keys_or_values(path)]
    return found or _refuse(model, "outputs", "keys and values")


def _last_of_feed_forward(model: nn.Module) -> list[str]:
    """Of matrices side by side, outside attention, the last whose outputs can be the inputs of all others."""
    shapes = {path: shape for path, shape in matrices(model, [ALL_LINEAR], key="inputs").items() if not _in_attention(path)}
    found = []
    for layer in dict.fromkeys(path.rpartition(".")[0] for path in shapes):
        group = [path for path in shapes if path.rpartition(".")[0] == layer]
        back = [one for one in group if all(shapes[other][0] == shapes[one][1] for other in group if other != one)]
        found += back[-1:] if len(group) > 1 else []
    return found or _refuse(model, "inputs", "feed-forward layers")


def _refuse(model: nn.Module, key: str, what: str) -> list[str]:
    raise NoSuchModule(f"{key}: auto finds no {what} in {type(model).__name__}. Name the matrices instead.")
