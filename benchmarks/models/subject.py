"""A model that is asked about, and the copies of it that Trimtab gets."""

import copy
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from typing import Any, NamedTuple

import torch
from models.references import LONGEST, alone, prompts, rows
from torch import Tensor

import trimtab
from trimtab.core.errors import TrimtabError
from trimtab.core.wrapping import base_modules, unwrap
from trimtab.data import pack_tree
from trimtab.engine import check_packing, pack_logprobs
from trimtab.engine.patching import layers_of
from trimtab.engine.recompute import Level
from trimtab.engine.structure import LayerStructure


class Adapted(NamedTuple):
    """A copy of the model with an adapter that is off its first values, where half of the gradients would be zero."""

    base: Any
    adapter: Any

    @property
    def model(self) -> Any:
        return self.base.model


@torch.no_grad()
def perturb(parameters: Mapping[str, Tensor]) -> None:
    """Move an adapter off its first values."""
    generator = torch.Generator().manual_seed(2)
    for tensor in parameters.values():
        tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator).to(tensor.dtype))


class Subject:
    """A model that is asked about, which stays as it is: Trimtab gets copies."""

    def __init__(self, pristine: Any) -> None:
        self.pristine = pristine
        self.limit = min(self._limit(), LONGEST)
        """The most tokens of a row that Trimtab accepts of this model, if that is fewer than the rows have."""
        self.rows, self.prompts = rows(self.limit), prompts(self.limit)
        with torch.no_grad():
            self.expected = alone(pristine, self.rows)

    def _limit(self) -> int:
        try:
            return self.checked().context_length or LONGEST
        except Exception:  # the measures say what it is
            return LONGEST

    def base(self) -> Any:
        """A Base of a copy."""
        return trimtab.Base(copy.deepcopy(self.pristine), None)

    def checked(self) -> Any:
        """A Base of a copy, after the check that `fit` makes first."""
        base = self.base()
        check_packing(base.model)
        return base

    def adapted(self, method: Any) -> Adapted:
        """A copy with an adapter."""
        base = self.checked()
        adapter = trimtab.attach(base.model, method, sample=trimtab.sample(base, self.rows))
        perturb(adapter.parameters())
        return Adapted(base, adapter)

    @cached_property
    def targets(self) -> tuple[str, str]:
        """What LoRA adapts here: `all-linear`; or `attention`, and why not all."""
        try:
            self.adapted(trimtab.LoRA(rank=4))
        except TrimtabError as error:
            return "attention", str(error)
        return "all-linear", ""

    @cached_property
    def lora(self) -> Adapted:
        return self.adapted(trimtab.LoRA(rank=4, targets=self.targets[0]))

    @cached_property
    def gradients(self) -> dict[str, tuple[Tensor, Tensor]]:
        return self.compared_gradients()

    def compared_gradients(self, *, recompute: Level = "none") -> dict[str, tuple[Tensor, Tensor]]:
        """By the LoRA's parameters that have any: their gradients from a pack, and from the rows alone."""
        model, parameters = self.lora.model, self.lora.adapter.parameters()
        sums = (pack_logprobs(model, pack_tree(self.rows), recompute=recompute).sum(), alone(model, self.rows).sum())
        ours, theirs = (torch.autograd.grad(total, list(parameters.values()), allow_unused=True) for total in sums)
        zeros = torch.zeros_like
        return {
            name: (zeros(p) if a is None else a, zeros(p) if b is None else b)
            for (name, p), a, b in zip(parameters.items(), ours, theirs, strict=True)
            if a is not None or b is not None
        }

    def parts_by_hand(self) -> dict[str, int]:
        """The parts of decoder layers that fused operations compute in a pack, and in how many layers."""
        model = self.checked().model
        with torch.no_grad():
            pack_logprobs(model, pack_tree(self.rows))
        structures = [layer.forward.learned for layer in layers_of(model)]
        return dict(Counter(part for one in structures if isinstance(one, LayerStructure) for part in one.by_hand))

    def facts(self) -> dict[str, Any]:
        """What the default LoRA adapts, and which matrices of the text model it leaves as they are."""
        model, layers = self.lora.model, self.lora.adapter.layers
        ends = {id(unwrap(end)) for end in (model.get_input_embeddings(), model.get_output_embeddings())}
        text = {id(module) for module in model.get_decoder().modules()}
        adapted = {path for path in layers if id(unwrap(layers[path])) in text}
        left = Counter(
            f"{path.rpartition('.')[2]}.{name}"
            for path, module in base_modules(model).items()
            if id(module) in text - ends and path not in layers and not isinstance(module, torch.nn.Embedding)
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.ndim > 1
        )
        return {
            "targets": self.targets[0],
            "why": self.targets[1],
            "attached": dict(Counter(path.rpartition(".")[2] for path in layers)),
            "outside": len(layers) - len(adapted),
            "left": dict(left),
            "idle": sum(not any(name.startswith(f"{path}.") for name in self.gradients) for path in layers),
        }
