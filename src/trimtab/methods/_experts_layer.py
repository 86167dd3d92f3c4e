"""The adapter layer of fused experts: the module's own forward pass, in which adapters change each expert's matrices.

Shapes: T tokens, k experts a token, S = T·k rows, each a token at one of its experts; E experts; n inputs and m outputs of a matrix.
"""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.core.errors import UnsupportedModel
from trimtab.core.wrapping import unwrap
from trimtab.methods._base import AdapterLayer
from trimtab.methods._experts import as_matrices
from trimtab.methods._matrices import trainable_dtype

ALIGNMENT = 16
"""Of how many bytes torch's grouped product wants every row to be a multiple."""


class Rows(NamedTuple):
    """The rows of a pass, sorted by expert."""

    order: Tensor
    """Where each stood before, T·k: S."""
    expert: Tensor
    """S, rising."""
    ends: Tensor
    """Where each expert's rows end: E."""

    @classmethod
    def sort(cls, experts: Tensor, count: int, eager: bool) -> "Rows":
        """By the experts of each token, T k.

        Args:
            eager: One expert's rows in the order of Transformers' eager code, not of its grouped code: it decides the last bits.
        """
        expert, order = (experts.T if eager else experts).flatten().sort(stable=eager)
        if eager:
            order = order % len(experts) * experts.shape[1] + order // len(experts)
        ends = torch.searchsorted(expert, torch.arange(count, device=expert.device), right=True, out_int32=True)
        return cls(order, expert, ends)

    def times(self, x: Tensor, matrices: Tensor) -> Tensor:
        """Each row of x (S n) times the transposed matrix of its expert (E m n): S m.

        A matrix that is not trained costs no gradient. Measured on a CPU in float32, with LoRA, forward and backward: the
        grouped product takes 0.5 to 0.85 of the time of a product for each expert, and gives the same bits.
        """
        widths = (x.shape[1], matrices.shape[1])
        aligned = all(width * x.element_size() % ALIGNMENT == 0 for width in widths)
        if aligned and x.dtype != torch.float64 and hasattr(F, "grouped_mm"):  # PyTorch 2.10
            return F.grouped_mm(x, matrices.mT, offs=self.ends)
        parts = x.tensor_split(self.ends[:-1].tolist())
        return torch.cat([F.linear(part, matrix) for part, matrix in zip(parts, matrices.unbind(), strict=True)])

    def of(self, values: Tensor) -> Tensor:
        """Each row's values, from those of its expert (E …)."""
        return values[self.expert]


class ExpertMatrices(NamedTuple):
    """One matrix of each expert, and the rows they are applied to."""

    weight: Tensor
    """E m n."""
    bias: Tensor | None
    """E m."""
    rows: Rows

    def product(self, x: Tensor) -> Tensor:
        """S n: S m."""
        y = self.rows.times(x, self.weight)
        return y if self.bias is None else y + self.rows.of(self.bias)


class ExpertPart(nn.Module):
    """What an adapter trains for one matrix of every expert."""

    def adapt(self, base: Callable[[Tensor], Tensor], at: ExpertMatrices, x: Tensor) -> Tensor:
        """The adapted product of S n, from `base`, that of the model or of another adapter: S m."""
        raise NotImplementedError

    def merged(self, weight: Tensor) -> Tensor:
        """The matrices (E m n) with the change in them."""
        raise NotImplementedError

    def merged_bias(self, bias: Tensor) -> Tensor:
        """The biases (E m) with the change in them."""
        return bias


class ExpertsLayer(AdapterLayer):
    """Fused experts, some of whose parameters have a part of this adapter, under the parameter's own name.

    With the adapter off, the base runs as it is. Otherwise this is the base's function with the parts' changes of its matrices,
    whichever family it is of: what differs between them, gate, activation and norm, are the base's own methods.
    """

    def __init__(self, base: nn.Module, parts: Mapping[str, ExpertPart]) -> None:
        super().__init__(base)
        if getattr(base, "_is_expert_parallel", False):
            raise UnsupportedModel(f"The experts of {type(base).__name__} are split over processes. Load the model in one.")
        for name, part in parts.items():
            setattr(self, name, part)  # not add_module, which refuses names that the base answers

    def adapt(self, hidden: Tensor, experts: Tensor, routing_weights: Tensor) -> Tensor:
        """T d, and each token's experts and their weights (T k): T d."""
        own: Any = unwrap(self)
        eager = own.config._experts_implementation == "eager"
        rows = Rows.sort(experts, len(own.down_proj), eager)
        token = rows.order // experts.shape[1]
        parameters, layers = self._acting()

        def product(name: str, x: Tensor) -> Tensor:
            bias = parameters[f"{name}_bias"] if own.has_bias else None
            at = ExpertMatrices(as_matrices(own, parameters[name]), bias, rows)
            linear: Callable[[Tensor], Tensor] = at.product
            for layer in layers:
                if isinstance(part := layer._modules.get(name), ExpertPart):
                    linear = partial(part.adapt, linear, at)
            return linear(x)

        y = (
            own._apply_gate(product("gate_up_proj", hidden[token]))
            if own.has_gate
            else own.act_fn(product("up_proj", hidden[token]))
        )
        y = product("down_proj", y)
        if getattr(own, "has_post_expert_norm", False):
            y = own.post_expert_norm(y)
        y = y * routing_weights.flatten()[rows.order, None]
        if eager:  # summed in its order: a fresh adapter changes no bit
            return torch.zeros_like(hidden).index_add(0, token, y.to(hidden.dtype))
        return y[rows.order.argsort()].view(*experts.shape, -1).sum(dim=1).to(hidden.dtype)

    def _acting(self) -> tuple[dict[str, Tensor], "list[ExpertsLayer]"]:
        """The parameters that act in place of the module's own, and the layers that change them, the innermost first."""
        own = unwrap(self)
        parameters: dict[str, Tensor] = dict(own.named_parameters(recurse=False))
        layers: list[ExpertsLayer] = []
        layer: nn.Module = self
        while isinstance(layer, AdapterLayer):
            if layer is self or layer.switch.state:
                if isinstance(layer, ExpertsLayer):
                    layers.insert(0, layer)
                elif (replaced := layer.replacement_parameters()) is not None:
                    parameters |= {name: value.to(parameters[name].dtype) for name, value in replaced.items()}
                else:
                    raise UnsupportedModel(
                        f"{type(layer).__name__} and {type(self).__name__} cannot act on the same experts at once: switch one of them off."
                    )
            layer = layer.base
        return parameters, layers

    @torch.no_grad()
    def merge(self) -> nn.Module:
        twin: Any = copy.deepcopy(unwrap(self))
        for name, part in self.named_children():
            if isinstance(part, ExpertPart):
                weight = as_matrices(twin, getattr(twin, name))
                changed = as_matrices(twin, part.merged(weight.to(trainable_dtype(weight))))
                setattr(twin, name, nn.Parameter(changed.contiguous(), requires_grad=False))
                if twin.has_bias:
                    bias = getattr(twin, f"{name}_bias")
                    changed = part.merged_bias(bias.to(trainable_dtype(bias)))
                    setattr(twin, f"{name}_bias", nn.Parameter(changed, requires_grad=False))
        return twin
