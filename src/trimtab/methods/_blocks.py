"""A model's blocks, and where the two halves of each end: the matrix that attention ends with, and the MLP."""

import inspect
from collections.abc import Iterable
from typing import Any

from torch import nn

from trimtab.core.errors import UnsupportedModel
from trimtab.core.wrapping import modules, unwrap
from trimtab.methods._base import matrix_shape
from trimtab.methods._targets import ATTENTION_NAMES

OUTPUT_NAMES = {"o_proj", "out_proj", "c_proj", "dense", "Wo"}
"""What Transformers' causal language models call the matrix that attention ends with."""
MLP_NAMES = {"mlp", "feed_forward", "ffn", "block_sparse_moe"}
"""What they call the MLP of a block, mixtures of experts included."""


def attention_outputs(model: Any) -> dict[str, str]:
    """The path of the matrix that attention ends with, by its block's. Raises UnsupportedModel unless each block has exactly one."""
    found = {}
    for block, inside in _blocks(model).items():
        matrices = [path for path, module in inside.items() if matrix_shape(module) and ATTENTION_NAMES & set(path.split("."))]
        outputs = [path for path in matrices if path.rpartition(".")[2] in OUTPUT_NAMES]
        found[block] = _only(
            outputs, model, block, "attention output projection", OUTPUT_NAMES, matrices or _children(inside, block)
        )
    return found


def mlps(model: Any) -> dict[str, str]:
    """The path of the MLP by its block's. Raises UnsupportedModel unless each block has exactly one, and it takes one hidden state."""
    hidden, found = model.config.get_text_config().hidden_size, {}
    for block, inside in _blocks(model).items():
        children = _children(inside, block)
        named = [path for path in children if path.rpartition(".")[2] in MLP_NAMES]
        found[block] = _only(named, model, block, "MLP", MLP_NAMES, children)
        module = inside[found[block]]
        takes = [name for name, one in inspect.signature(module.forward).parameters.items() if _is_required(one)]
        if len(takes) > 1 or stream_size(module) != hidden:
            raise UnsupportedModel(
                f"{found[block]} of {type(model).__name__} takes {', '.join(takes)} and its first matrix {stream_size(module)} inputs, "
                f"where the MLP that a bottleneck adapter stands at takes one hidden state, of {hidden}."
            )
    return found


def stream_size(module: nn.Module) -> int:
    """The size of the hidden states that a matrix makes, or that an MLP takes, by the first of its matrices; 0 if it has none."""
    if shape := matrix_shape(module):
        return shape[1]
    for part in map(unwrap, module.modules()):
        if shape := matrix_shape(part):
            return shape[0]
        for parameter in part.parameters(recurse=False):
            if parameter.ndim == 2:  # a router's, (experts, hidden)
                return int(parameter.shape[1])
    return 0


def _blocks(model: Any) -> dict[str, dict[str, nn.Module]]:
    """By the path of each of the model's blocks, in order: the modules inside by theirs."""
    everything, count = modules(model), model.config.get_text_config().num_hidden_layers
    lists = [path for path, module in everything.items() if isinstance(module, nn.ModuleList) and len(module) == count]
    outer = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]  # experts may be a list too
    if len(outer) != 1:
        raise UnsupportedModel(
            f"{type(model).__name__} has {count} layers by its configuration, and {len(outer) or 'no'} lists of so many modules"
            f"{' (' + ', '.join(outer) + ')' if outer else ''}, so which are its blocks is not clear."
        )
    found: dict[str, dict[str, nn.Module]] = {f"{outer[0]}.{number}": {} for number in range(count)}
    for path, module in everything.items():
        if path.startswith(f"{outer[0]}.") and (block := ".".join(path.split(".")[: outer[0].count(".") + 2])) != path:
            found[block][path] = module
    return found


def _children(inside: Iterable[str], block: str) -> list[str]:
    return [path for path in inside if path.count(".") == block.count(".") + 1]


def _is_required(one: inspect.Parameter) -> bool:
    return one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)


def _only(found: list[str], model: Any, block: str, what: str, names: set[str], there: Iterable[str]) -> str:
    if len(found) != 1:
        have = ", ".join(path.removeprefix(f"{block}.") for path in (found or there))
        raise UnsupportedModel(
            f"{block} of {type(model).__name__} has {len(found) or 'no'} {what}{'s' if found else ''}, and a bottleneck adapter "
            f"needs one in every block. Looked for: {', '.join(sorted(names))}. Found: {have or 'nothing'}."
        )
    return found[0]
