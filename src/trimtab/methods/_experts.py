"""Fused experts: the experts of a mixture as one module, whose matrices are the slices of 3-D parameters; and their routers.

Transformers gives such modules one interface (`integrations/moe.py`), and what has it is recognized by it: `gate_up_proj`, or
`up_proj` where nothing gates, and `down_proj`, each with one matrix an expert; and in which form they are, `has_gate`,
`is_transposed` and `has_bias`; from 5.20 on, `has_post_expert_norm`. In what follows E is the number of experts.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from trimtab.core.wrapping import whole_shape

FLAGS = ("has_gate", "has_bias", "is_transposed")
"""What modules of the interface say of themselves."""
ROUTER_NAMES = {"gate", "router"}
"""What Transformers' models call the module beside the experts that chooses among them."""


class MatrixShape(NamedTuple):
    """The sizes of a matrix, or of one for each expert."""

    inputs: int
    outputs: int
    experts: int = 0
    """How many matrices of these sizes one parameter holds; 0 for a matrix that is a module of its own."""

    @property
    def copies(self) -> int:
        return self.experts or 1


def expert_shapes(module: nn.Module) -> dict[str, MatrixShape]:
    """The matrices of fused experts by the names of the parameters, in the order they act; of any other module, none."""
    own: Any = module
    if not all(isinstance(getattr(module, flag, None), bool) for flag in FLAGS):
        return {}
    shapes = {}
    for name in ("gate_up_proj" if own.has_gate else "up_proj", "down_proj"):
        weight = module._parameters.get(name)
        shape = () if weight is None else whole_shape(weight)
        if weight is None or len(shape) != 3 or not weight.is_floating_point():
            return {}
        shapes[name] = MatrixShape(shape[1 if own.is_transposed else 2], shape[2 if own.is_transposed else 1], shape[0])
    return shapes


def as_matrices(module: Any, weight: Tensor) -> Tensor:
    """A parameter of fused experts as E outputs inputs; or such matrices as the parameter that the module holds."""
    return weight.mT if module.is_transposed else weight


def routers(own: Mapping[str, nn.Module]) -> set[str]:
    """The paths of the modules that choose experts, and of all modules in them.

    A router stands beside the experts, and is called so or has one output for each of them; or is called `router` anywhere.
    """
    counts: dict[str, set[int]] = {}
    for path, module in own.items():
        if count := _expert_count(path, module):
            counts.setdefault(path.rpartition(".")[0], set()).add(count)
    tops = set()
    for path, module in own.items():
        parent, _, name = path.rpartition(".")
        weight = module._parameters.get("weight")
        outputs = len(weight) if weight is not None and weight.ndim == 2 else 0
        if name == "router" or (parent in counts and (name in ROUTER_NAMES or outputs in counts[parent])):
            tops.add(path)
    return {path for path in own if is_inside(path, tops)}


def _expert_count(path: str, module: nn.Module) -> int:
    if shapes := expert_shapes(module):
        return next(iter(shapes.values())).experts
    name = path.rpartition(".")[2]
    if isinstance(module, nn.ModuleList):
        return len(module) if "expert" in name else 0
    count = getattr(module, "num_experts", 0) if name == "experts" else 0
    return count if isinstance(count, int) else 0


def is_inside(path: str, tops: Sequence[str] | set[str]) -> bool:
    """Whether a module is one of these, or in one."""
    while path and path not in tops:
        path = path.rpartition(".")[0]
    return bool(path)
