"""(IA)³: learned vectors that scale keys, values and the inner activations of feed-forward layers.

Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
arXiv:2205.05638, section 3.3.
"""

import re
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from trimtab.errors import ArtifactError, NoSuchModule, RecipeError
from trimtab.methods._base import AdapterLayer, Circumstances, Method, look_through, matrix_shape, modules, wide, with_weight
from trimtab.methods._peft import SELECTING, from_names, only_known, shortest_names, to_names
from trimtab.methods._targets import ALL_LINEAR, ATTENTION, Patterns, matrices

AUTO = "auto"
"""The target that is found from the model's structure."""
KEYS_VALUES = re.compile(r"(k|v|key|value)(_proj)?|c_attn|qkv|qkv_proj|query_key_value|Wqkv")
"""What Transformers' attention modules call the matrices that make keys and values, alone or with the queries."""
NAMES = {"scale": "ia3_l"}
"""PEFT's name of ours."""


class IA3(Method):
    """Multiplies what some matrices give, and what some others take, by learned vectors, which start as ones."""

    peft_type: ClassVar[str | None] = "IA3"

    outputs: Patterns = (AUTO,)
    """The matrices whose outputs are scaled: `auto` (keys and values), names such as `v_proj`, or regular expressions over whole paths.

    Where one matrix makes queries, keys and values (GPT-2, Phi-3), `auto` scales all of its outputs, as PEFT does. To scale a
    query's number is to scale that of the keys it is multiplied with.
    """
    inputs: Patterns = (AUTO,)
    """The matrices whose inputs are scaled: `auto` (the last of each feed-forward layer), names such as `down_proj`, or expressions."""

    def shapes(self, model: nn.Module) -> dict[str, tuple[int, bool]]:
        """The targeted matrices: path -> how many numbers are scaled, and whether they are its inputs. Raises RecipeError."""
        found = {}
        for key, patterns, auto in (("outputs", self.outputs, _keys_values), ("inputs", self.inputs, _downward)):
            plain = [path for one in patterns for path in (auto(model) if one == AUTO else (one,))]
            for path, shape in (matrices(model, plain, key=key) if plain else {}).items():
                if path in found:
                    raise RecipeError(f"inputs: {path} is one of `outputs` as well, and a matrix is scaled on one side only.")
                found[path] = (shape[key == "outputs"], key == "inputs")
        if not found:
            raise RecipeError("outputs and inputs: both are empty, so there is nothing to scale.")
        return {path: found[path] for path in modules(model) if path in found}

    def sites(self, model: nn.Module) -> list[str]:
        return list(self.shapes(model))
