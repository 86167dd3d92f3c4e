"""(IA)³: learned vectors that scale keys, values and the inner activations of feed-forward layers.

Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
arXiv:2205.05638, section 3.3.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from trimtab.core.errors import RecipeError
from trimtab.core.wrapping import modules
from trimtab.methods._base import AdapterLayer, LearningRateContext, Method, matrix_shape, wide, with_weight
from trimtab.methods._parts import feed_forward_ends, in_attention, keys_values, makes_keys_or_values
from trimtab.methods._peft import SELECTING, from_names, only_known, shortest_names, to_names
from trimtab.methods._targets import ALL_LINEAR, ATTENTION, Patterns, matches, matrices

AUTO = "auto"
"""The target that is found from the model's structure."""
NAMES = {"scale": "ia3_l"}
"""PEFT's name of ours."""


class IA3(Method):
    """Multiplies what some matrices give, and what some others take, by learned vectors, which start as ones."""

    peft_type: ClassVar[str | None] = "IA3"

    outputs: Patterns = (AUTO,)
    """Matrices whose outputs are scaled: `auto` (keys and values), names such as `v_proj`, or regular expressions, such as `[qv]_proj`.

    Where one matrix makes queries, keys and values (GPT-2, Phi-3), `auto` scales all that it gives, as PEFT does: to scale a
    number of a query is to scale the number of the key that it is multiplied by.
    """
    inputs: Patterns = (AUTO,)
    """Matrices whose inputs are scaled: `auto` (the last of each feed-forward layer), or names and expressions in the same way."""

    def sizes(self, model: nn.Module) -> dict[str, int]:
        """path -> how many numbers are scaled, in the model's order. Raises RecipeError, NoSuchModule."""
        outputs = _chosen(model, self.outputs, "outputs", keys_values)
        inputs = _chosen(model, self.inputs, "inputs", feed_forward_ends)
        if both := outputs.keys() & inputs.keys():
            raise RecipeError(f"inputs: {min(both)} is among `outputs` too, and a matrix is scaled on one side only.")
        if not outputs and not inputs:
            raise RecipeError("outputs and inputs are both empty, so there is nothing to scale.")
        found = {path: gives for path, (_, gives) in outputs.items()} | {path: takes for path, (takes, _) in inputs.items()}
        return {path: found[path] for path in modules(model) if path in found}

    def sites(self, model: nn.Module) -> list[str]:
        return list(self.sizes(model))

    def on_inputs(self, path: str) -> bool:
        """Of a site, which is among the outputs or the inputs and never among both."""
        of_group = {AUTO: makes_keys_or_values(path), ALL_LINEAR: True, ATTENTION: in_attention(path)}
        return not any(of_group[one] if one in of_group else matches(one, path) for one in self.outputs)

    def layer(self, base: nn.Module, path: str) -> "IA3Layer":
        return IA3Layer(base, self.on_inputs(path))

    def parameter_count(self, model: nn.Module) -> int:
        """Σ outputs over the matrices whose outputs are scaled + Σ inputs over those whose inputs are."""
        return sum(self.sizes(model).values())

    def learning_rate(self, at: LearningRateContext) -> tuple[float, str]:
        """1e-2, by a small search: see docs/methods.md."""
        return 1e-2, "1e-2"

    def to_peft(self, model: nn.Module, tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        everything, sites = modules(model), self.sites(model)
        inputs = [path for path in sites if self.on_inputs(path)]
        outputs = [path for path in sites if not self.on_inputs(path)]
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
        ignored = {"feedforward_modules", "fan_in_fan_out", "init_ia3_weights", *SELECTING}
        only_known(config, honoured=set(), neutral={}, ignored=ignored)
        renamed, paths = from_names(tensors, NAMES, "(IA)³")
        outputs = [path for path in paths if renamed[f"{path}.scale"].shape[-1:] == (1,)]  # the others' are (1, inputs)
        method = cls.parse({"outputs": outputs, "inputs": [path for path in paths if path not in outputs]})
        return method, {name: t.flatten() for name, t in renamed.items()}


class IA3Layer(AdapterLayer):
    """y = scale ⊙ base(x), or base(scale ⊙ x)."""

    def __init__(self, base: nn.Module, on_inputs: bool) -> None:
        super().__init__(base)
        self.on_inputs = on_inputs
        shape = matrix_shape(base)
        assert shape is not None, f"{type(base).__name__} is not a matrix"
        size = shape[0] if on_inputs else shape[1]
        self.scale = nn.Parameter(torch.ones(size, dtype=wide(next(base.parameters()))))

    def adapt(self, x: Tensor) -> Tensor:
        return self.base(self.scaled(x)) if self.on_inputs else self.scaled(self.base(x))

    def scaled(self, x: Tensor) -> Tensor:
        return (x * self.scale).to(x.dtype)  # not in the base's few bits, where a scale could hardly leave 1

    @torch.no_grad()
    def merged(self) -> nn.Module:
        factor = self.scale if self.on_inputs else self.scale[:, None]
        made: Any = with_weight(self.base, lambda weight: factor * weight)
        if made.bias is not None and not self.on_inputs:
            made.bias = nn.Parameter(self.scale * made.bias, requires_grad=False)
        return made


def _chosen(
    model: nn.Module, patterns: Sequence[str], key: str, auto: Callable[[nn.Module, str], list[str]]
) -> dict[str, tuple[int, int]]:
    targets = [target for one in patterns for target in (auto(model, key) if one == AUTO else [one])]
    return matrices(model, targets, key=key) if targets else {}
