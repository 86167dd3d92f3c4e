"""(IA)³: trained vectors that scale keys, values and the inner activations of feed-forward layers.

Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
arXiv:2205.05638, section 3.3.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from trimtab.core.errors import RecipeError
from trimtab.methods import (
    ALL_LINEAR,
    ATTENTION,
    AdapterLayer,
    MatrixShape,
    Method,
    Patterns,
    base_modules,
    find_matrices,
    matches_target,
    matrix_modules,
    require_matrix_shape,
    shortest_names,
    targeted_experts,
    to_peft_names,
    trainable_dtype,
    with_weight,
)
from trimtab.methods._experts_layer import ExpertsLayer
from trimtab.methods._layers import Layers, within_layers
from trimtab.methods._matrices import matrices
from trimtab.methods._scaled_experts import ScaledExperts
from trimtab.methods._structure import feed_forward_outputs, is_in_attention, key_value_matrices, makes_keys_or_values

AUTO = "auto"
"""The target that is found from the model's structure."""


class IA3(Method):
    """Multiplies the outputs of some matrices, and the inputs of some others, by trained vectors, which start as ones."""

    peft_type: ClassVar[str | None] = "IA3"
    peft_names: ClassVar[dict[str, str]] = {"scale": "ia3_l"}
    auto_lr: ClassVar[str] = "1e-2"

    outputs: Patterns = (AUTO,)
    """Matrices whose outputs are scaled: `auto` (keys and values), names such as `v_proj`, or regular expressions, such as `[qv]_proj`.

    Where one matrix makes queries, keys and values (GPT-2, Phi-3), `auto` scales all its outputs, as PEFT does: scaling a
    number of a query is the same as scaling the number of the key that it is multiplied by.
    """
    inputs: Patterns = (AUTO,)
    """Matrices whose inputs are scaled: `auto` (the last of each feed-forward layer), or names and expressions in the same way."""

    layers: Layers = None

    def sizes(self, model: nn.Module) -> dict[str, int]:
        """path -> how many numbers are scaled, in the model's order. Raises RecipeError, NoSuchModule."""
        outputs = _resolve(model, self.outputs, "outputs", self.layers, key_value_matrices)
        inputs = _resolve(model, self.inputs, "inputs", self.layers, feed_forward_outputs)
        if both := outputs.keys() & inputs.keys():
            raise RecipeError(f"inputs: {min(both)} is among `outputs` too, and a matrix is scaled on one side only.")
        if not outputs and not inputs:
            raise RecipeError("outputs and inputs are both empty, so there is nothing to scale.")
        sizes = {path: at.outputs * at.copies for path, at in outputs.items()}
        sizes |= {path: at.inputs * at.copies for path, at in inputs.items()}
        return {path: sizes[path] for path in matrices(model) if path in sizes}

    def sites(self, model: nn.Module) -> list[str]:
        shapes = matrices(model)
        return matrix_modules({path: shapes[path] for path in self.sizes(model)})

    def on_inputs(self, path: str) -> bool:
        """Whether the inputs of a matrix are scaled, rather than its outputs."""
        in_group = {AUTO: makes_keys_or_values(path), ALL_LINEAR: True, ATTENTION: is_in_attention(path)}
        return not any(in_group[target] if target in in_group else matches_target(target, path) for target in self.outputs)

    def layer(self, base: nn.Module, path: str) -> AdapterLayer:
        outputs = targeted_experts(path, base, [target for target in self.outputs if target != AUTO])
        inputs = targeted_experts(path, base, ["down_proj" if target == AUTO else target for target in self.inputs])
        parts = {at: ScaledExperts(base, shape, at in inputs) for at, shape in (outputs | inputs).items()}
        if parts:
            return ExpertsLayer(base, {at.rpartition(".")[2]: part for at, part in parts.items()})
        return IA3Layer(base, self.on_inputs(path))

    def parameter_count(self, model: nn.Module) -> int:
        """Σ outputs over the matrices whose outputs are scaled + Σ inputs over those whose inputs are."""
        return sum(self.sizes(model).values())

    def to_peft(self, model: nn.Module, tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        own, sites = base_modules(model), list(self.sizes(model))
        if not own.keys() >= set(sites):  # PEFT has no scales for experts
            return self.trimtab_only_config(), to_peft_names(tensors, self.peft_names)
        inputs = [path for path in sites if self.on_inputs(path)]
        outputs = [path for path in sites if not self.on_inputs(path)]
        names = shortest_names(model, inputs)
        if any(path.endswith(tuple(names)) for path in outputs):
            names = inputs  # PEFT compares these with the ends of paths, letter by letter
        config = self.peft_config(
            target_modules=[*shortest_names(model, outputs), *names],
            feedforward_modules=names,
            fan_in_fan_out=any(not isinstance(own[path], nn.Linear) for path in sites),
        )
        shaped = {key: t[None] if key.rpartition(".")[0] in inputs else t[:, None] for key, t in tensors.items()}
        return config, to_peft_names(shaped, self.peft_names)

    @classmethod
    def from_peft(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[Self, dict[str, Tensor]]:
        ignored = {"feedforward_modules", "fan_in_fan_out", "init_ia3_weights"}
        renamed, paths = cls.read_peft(config, tensors, ignored=ignored)
        outputs = [path for path in paths if renamed[f"{path}.scale"].shape[-1:] == (1,)]  # the others' are (1, inputs)
        method = cls.parse({"outputs": outputs, "inputs": [path for path in paths if path not in outputs]})
        ours_alone = config.get("peft_type") != cls.peft_type  # with experts
        return method, renamed if ours_alone else {name: t.flatten() for name, t in renamed.items()}


class IA3Layer(AdapterLayer):
    """y = scale ⊙ base(x), or base(scale ⊙ x)."""

    def __init__(self, base: nn.Module, on_inputs: bool) -> None:
        super().__init__(base)
        self.on_inputs = on_inputs
        inputs, outputs = require_matrix_shape(base)
        self.scale = nn.Parameter(torch.ones(inputs if on_inputs else outputs, dtype=trainable_dtype(base)))

    def adapt(self, x: Tensor) -> Tensor:
        return self.base(self.scaled(x)) if self.on_inputs else self.scaled(self.base(x))

    def scaled(self, x: Tensor) -> Tensor:
        return (x * self.scale).to(x.dtype)  # not in the base's few bits, where a scale could hardly leave 1

    @torch.no_grad()
    def merge(self) -> nn.Module:
        factor = self.scale if self.on_inputs else self.scale[:, None]
        merged: Any = with_weight(self.base, lambda weight: factor * weight)
        if merged.bias is not None and not self.on_inputs:
            merged.bias = nn.Parameter(self.scale * merged.bias, requires_grad=False)
        return merged


def _resolve(
    model: nn.Module, patterns: Sequence[str], key: str, layers: str | None, auto: Callable[[nn.Module, str], list[str]]
) -> dict[str, MatrixShape]:
    found: dict[str, MatrixShape] = {}
    for pattern in patterns:
        if pattern == AUTO:
            inside = within_layers(model, layers, auto(model, key), f"{key}: {AUTO}")
            found |= find_matrices(model, [*inside], experts=True, key=key)
        else:
            found |= find_matrices(model, [pattern], experts=True, key=key, layers=layers)
    return found
