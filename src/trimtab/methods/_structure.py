"""Parts of a model found by its structure: blocks, attention outputs, MLPs, matrices that make keys and values, and norms."""

import inspect
import re
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

from torch import nn

from trimtab.core.errors import NoSuchModule, UnsupportedModel
from trimtab.core.wrapping import base_modules, text_modules
from trimtab.methods import ALL_LINEAR, ATTENTION, find_matrices, matrix_shape, unwrap
from trimtab.methods._layers import stack_of_layers
from trimtab.methods._matrices import in_attention
from trimtab.methods._unsuited import asks_kind

OUTPUT_NAMES = {"o_proj", "out_proj", "c_proj", "dense", "Wo"}
"""What Transformers' causal language models call the matrix that attention ends with."""
MLP_NAMES = {"mlp", "feed_forward", "ffn", "block_sparse_moe"}
"""What they call the MLP of a block, mixtures of experts included."""
KEY_VALUE_NAMES = re.compile(r"(k|v|key|value)(_proj)?|c_attn|qkv(_proj)?|query_key_value|Wqkv")
"""What they call the matrices that make keys and values, alone or together with queries."""


ATTENTION_MATRICES = re.compile(r"(q|query|o)(_proj)?")
"""What they call attention's other matrices."""


def makes_keys_or_values(path: str) -> bool:
    """Whether a matrix of the blocks does, perhaps queries too, by its name."""
    return bool(KEY_VALUE_NAMES.fullmatch(path.rpartition(".")[2]))


def is_in_attention(path: str) -> bool:
    """Whether a matrix of the blocks is one of attention's, by names alone."""
    return in_attention(path) or makes_keys_or_values(path) or bool(ATTENTION_MATRICES.fullmatch(path.rpartition(".")[2]))


def key_value_matrices(model: Any, key: str) -> list[str]:
    """The matrices that make keys and values. Raises NoSuchModule, which begins with the recipe's `key`, if there is none."""
    paths = [path for path in find_matrices(model, [ATTENTION], key=key) if makes_keys_or_values(path)]
    return paths or _refuse_auto(model, key, "keys and values")


def feed_forward_outputs(model: Any, key: str) -> list[str]:
    """Of matrices side by side, outside attention, the last whose outputs can be the inputs of all others. Raises NoSuchModule."""
    own = base_modules(model)
    found = find_matrices(model, [ALL_LINEAR], experts=True, key=key)
    shapes = {path: shape for path, shape in found.items() if not in_attention(path, own)}
    paths = []
    for parent in dict.fromkeys(path.rpartition(".")[0] for path in shapes):
        group = [path for path in shapes if path.rpartition(".")[0] == parent]
        fitting = [
            path
            for path in group
            if all(shapes[path].outputs == shapes[sibling].inputs for sibling in group if sibling != path)
        ]
        paths += fitting[-1:] if len(group) > 1 else []
    return paths or _refuse_auto(model, key, "feed-forward layers")


def _refuse_auto(model: Any, key: str, part: str) -> NoReturn:
    raise NoSuchModule(f"{key}: auto finds no {part} in {type(model).__name__}. Name the matrices instead.")


def attention_outputs(model: Any) -> dict[str, str]:
    """The path of the matrix that attention ends with, by its block's. Raises UnsupportedModel unless each block has exactly one."""
    paths, own = {}, base_modules(model)
    for block, inside in _blocks(model).items():
        matrices = [path for path, module in inside.items() if matrix_shape(module) and in_attention(path, own)]
        outputs = [path for path in matrices if path.rpartition(".")[2] in OUTPUT_NAMES]
        alternatives = matrices or _children(inside, block)
        paths[block] = _require_one(outputs, model, block, "attention output projection", OUTPUT_NAMES, alternatives)
    return paths


def mlps(model: Any) -> dict[str, str]:
    """The path of the MLP by its block's. Raises UnsupportedModel unless each block has exactly one, and it takes one hidden state."""
    hidden, paths = model.config.get_text_config().hidden_size, {}
    for block, inside in _blocks(model).items():
        children = _children(inside, block)
        named = [path for path in children if path.rpartition(".")[2] in MLP_NAMES]
        paths[block] = _require_one(named, model, block, "MLP", MLP_NAMES, children)
        module, parent = inside[paths[block]], base_modules(model)[block]
        if asks_kind(parent, paths[block].rpartition(".")[2]):
            raise UnsupportedModel(
                f"{type(parent).__name__} asks of which class {paths[block]} is, and would take a bottleneck adapter there for another one."
            )
        required = [name for name, p in inspect.signature(module.forward).parameters.items() if _is_required(p)]
        if len(required) > 1 or stream_size(module) != hidden:
            raise UnsupportedModel(
                f"{paths[block]} of {type(model).__name__} takes {', '.join(required)} and its first matrix {stream_size(module)} "
                f"inputs, where the MLP that a bottleneck adapter stands at takes one hidden state, of {hidden}."
            )
    return paths


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
    parent, count = stack_of_layers(model)
    blocks: dict[str, dict[str, nn.Module]] = {f"{parent}.{number}": {} for number in range(count)}
    for path, module in text_modules(model).items():
        if path.startswith(f"{parent}.") and (block := ".".join(path.split(".")[: parent.count(".") + 2])) != path:
            blocks[block][path] = module
    return blocks


def _children(inside: Iterable[str], block: str) -> list[str]:
    return [path for path in inside if path.count(".") == block.count(".") + 1]


def _is_required(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)


def _require_one(paths: list[str], model: Any, block: str, part: str, names: set[str], alternatives: Iterable[str]) -> str:
    if len(paths) != 1:
        present = ", ".join(path.removeprefix(f"{block}.") for path in (paths or alternatives))
        raise UnsupportedModel(
            f"{block} of {type(model).__name__} has {len(paths) or 'no'} {part}{'s' if paths else ''}, and a bottleneck adapter "
            f"needs one in every block. Looked for: {', '.join(sorted(names))}. Found: {present or 'nothing'}."
        )
    return paths[0]


def find_norms(model: nn.Module) -> list[str]:
    """Paths of the modules that normalize and then scale, LayerNorm, RMSNorm and their like, in the model's order."""
    return [path for path, module in text_modules(model).items() if _is_norm(module)]


def _is_norm(module: nn.Module) -> bool:
    """It owns a vector that scales, perhaps one that shifts, and nothing else.

    The scale of a norm on the heads of queries and keys may be a matrix (Cohere's); then what tells it is its epsilon.
    """
    own = dict(own_weights(module))
    if "weight" not in own or not own.keys() <= {"weight", "bias"} or any(True for _ in module.children()):
        return False
    if matrix_shape(module) or isinstance(module, nn.Embedding):
        return False
    return own["weight"].ndim == 1 or any("eps" in name for name in vars(module))


def own_weights(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """A module's parameters, without those of the modules in it."""
    return module.named_parameters(recurse=False, remove_duplicate=False)
