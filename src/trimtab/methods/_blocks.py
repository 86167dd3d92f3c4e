"""Where a model's blocks end their two halves: the matrix that attention ends with, and the MLP."""

import inspect
from typing import Any

from torch import nn

from trimtab.errors import UnsupportedModel
from trimtab.methods._base import look_through, matrix_shape, modules
from trimtab.methods._targets import ATTENTION_NAMES

OUTPUT_NAMES = {"o_proj", "out_proj", "c_proj", "dense", "Wo"}
"""What Transformers' causal language models call the matrix that attention ends with."""
MLP_NAMES = {"mlp", "feed_forward", "ffn", "block_sparse_moe"}
"""What they call the MLP, mixtures of experts included."""


def blocks(model: Any) -> list[str]:
    """The paths of the model's blocks, in order. Raises UnsupportedModel if they cannot be told."""
    count = model.config.get_text_config().num_hidden_layers
    lists = [path for path, module in modules(model).items() if isinstance(module, nn.ModuleList) and len(module) == count]
    outer = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]  # experts are lists too
    if len(outer) != 1:
        raise UnsupportedModel(
            f"{type(model).__name__} has {count} layers by its configuration, and {' and '.join(outer) or 'no list'} of that length, "
            "so where its blocks are is not clear."
        )
    return [f"{outer[0]}.{number}" for number in range(count)]


def attention_output(model: nn.Module, block: str) -> str:
    """The path of the matrix that a block's attention ends with. Raises UnsupportedModel unless there is exactly one."""
    inside = [path for path in _inside(model, block) if ATTENTION_NAMES & set(path.split("."))]
    matrices = [path for path, module in modules(model).items() if path in inside and matrix_shape(module)]
    found = [path for path in matrices if path.rpartition(".")[2] in OUTPUT_NAMES]
    _exactly_one(model, block, "output projection of attention", OUTPUT_NAMES, found, matrices or _children(model, block))
    return found[0]


def mlp(model: Any, block: str) -> str:
    """The path of a block's MLP. Raises UnsupportedModel unless there is exactly one, from a token's hidden state to another."""
    children = _children(model, block)
    found = [path for path in children if path.rpartition(".")[2] in MLP_NAMES]
    _exactly_one(model, block, "MLP", MLP_NAMES, found, children)
    module, hidden = modules(model)[found[0]], model.config.get_text_config().hidden_size
    asks = [name for name, one in inspect.signature(module.forward).parameters.items() if one.default is one.empty]
    if len(asks) != 1 or stream_size(module) != hidden:
        raise UnsupportedModel(
            f"{found[0]} of {type(model).__name__} is called with {', '.join(asks)} and reads {stream_size(module)} numbers a token, "
            f"where an MLP is called with one hidden state, of {hidden}."
        )
    return found[0]


def stream_size(module: nn.Module) -> int:
    """The size of the hidden states that a matrix returns, or that an MLP reads with the first of its matrices; 0 if it has none."""
    if shape := matrix_shape(module):
        return shape[1]
    for part in map(look_through, module.modules()):
        if shape := matrix_shape(part):
            return shape[0]
        for parameter in part.parameters(recurse=False):
            if parameter.ndim == 2:  # a router, (experts, hidden)
                return int(parameter.shape[1])
    return 0


def _inside(model: nn.Module, block: str) -> list[str]:
    return [path for path in modules(model) if path.startswith(f"{block}.")]


def _children(model: nn.Module, block: str) -> list[str]:
    return [path for path in _inside(model, block) if "." not in path.removeprefix(f"{block}.")]


def _exactly_one(model: nn.Module, block: str, what: str, names: set[str], found: list[str], there: list[str]) -> None:
    if len(found) != 1:
        have = ", ".join(path.removeprefix(f"{block}.") for path in (found or there))
        raise UnsupportedModel(
            f"{block} of {type(model).__name__} has {len(found) or 'no'} {what}s, where a bottleneck adapter needs one in every block. "
            f"It is looked for as {', '.join(sorted(names))}; found: {have}."
        )
