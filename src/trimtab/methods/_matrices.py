"""Which matrices of a model a method adapts: `targets`, resolved to module paths or refused; and a module's matrix itself.

A target is `all-linear` (every matrix in the model's blocks), `attention` (those in its attention modules), the last
parts of dotted names (`q_proj`, `mlp.down_proj`, `layers.0.self_attn.q_proj`), or a regular expression for the same (`[qv]_proj`,
`q_proj|v_proj`, `self_attn\\..*`): it has to match them whole, or the whole path.
The embeddings and the head are adapted only where a method can, and only if they are named.
"""

import copy
import difflib
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, BeforeValidator, Field
from torch import Tensor, nn

from trimtab.core.config import as_tuple
from trimtab.core.errors import NoSuchModule, UnsupportedModel, listing
from trimtab.core.wrapping import base_modules, unwrap

ALL = "all"
"""The target that is every module a method can train."""
ALL_LINEAR, ATTENTION = "all-linear", "attention"
ATTENTION_NAMES = {"self_attn", "attn", "attention", "self_attention"}
"""What Transformers' causal language models call their attention modules."""

_NAME = re.compile(r"[\w.]+")


def _check_patterns(targets: Any) -> Any:
    """Every target (every key, of a mapping by target) is a name or a regular expression."""
    for target in targets:
        if target not in (ALL_LINEAR, ATTENTION) and not _NAME.fullmatch(target):
            try:
                re.compile(target)
            except re.error as error:
                raise ValueError(f"{target!r} is neither a module name nor a regular expression ({error}).") from None
    return targets


Targets = Annotated[tuple[str, ...], Field(min_length=1), BeforeValidator(as_tuple), AfterValidator(_check_patterns)]
"""A hyperparameter that holds one or more targets."""
Patterns = Annotated[tuple[str, ...], BeforeValidator(as_tuple), AfterValidator(_check_patterns)]
"""The same, perhaps empty."""
ByTarget = AfterValidator(_check_patterns)
"""For a hyperparameter that is a mapping: its keys are names or regular expressions, as targets are."""


def matches_target(pattern: str, path: str) -> bool:
    """Whether a target, other than a group, names or matches a path, or its last parts."""
    if _NAME.fullmatch(pattern):
        return path == pattern or path.endswith(f".{pattern}")
    parts = path.split(".")
    return any(re.fullmatch(pattern, ".".join(parts[first:])) for first in range(len(parts)))


def in_attention(path: str) -> bool:
    """Whether a module is inside an attention module."""
    return not ATTENTION_NAMES.isdisjoint(path.split("."))


def find_matrices(
    model: Any, targets: Sequence[str], *, embeddings_and_head: bool = False, key: str = "targets"
) -> dict[str, tuple[int, int]]:
    """The matrices that `targets` name: path -> (inputs, outputs), in the model's order.

    Args:
        embeddings_and_head: Whether these may be named too.
        key: What a recipe calls these targets.

    Raises:
        NoSuchModule: A target that matches nothing, or something that is not a matrix; or `all-linear` on a model
            with blocks that hold other weights (fused experts, say), which would silently stay as they are.
    """
    own = base_modules(model)
    head = unwrap(model.get_output_embeddings())
    in_blocks = {path: shape for path, module in own.items() if (shape := matrix_shape(module)) and module is not head}
    adaptable = in_blocks | (embedding_and_head_shapes(model) if embeddings_and_head else {})
    chosen: set[str] = set()
    for target in targets:
        if target == ALL_LINEAR:
            _refuse_uncovered(own, in_blocks, model)
            matching = list(in_blocks)
        elif target == ATTENTION:
            matching = [path for path in in_blocks if in_attention(path)]
        else:
            is_name = _NAME.fullmatch(target)  # an expression may match other modules beside matrices, a name may not
            matching = [path for path in (own if is_name else adaptable) if matches_target(target, path)]
        if not matching or not adaptable.keys() >= set(matching):
            raise NoSuchModule(f"{key}: {target!r} {_explain_mismatch(target, model, in_blocks, adaptable)}")
        chosen.update(matching)
    return {path: adaptable[path] for path in own if path in chosen}


def _explain_mismatch(target: str, model: Any, in_blocks: Mapping[str, Any], adaptable: Mapping[str, Any]) -> str:
    """Why a target names no matrices that can be adapted, and what to write instead."""
    own = base_modules(model)
    matching = [path for path in own if path not in adaptable and matches_target(target, path)]
    if not matching:
        near = difflib.get_close_matches(target, last_parts(adaptable), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        if not _NAME.fullmatch(target):
            hint = " A regular expression has to match a module's path or its last parts, such as mlp.down_proj, whole."
        return f"matches no module of {type(model).__name__}.{hint} It has: {', '.join(last_parts(in_blocks))}."
    where = "" if len(adaptable) > len(in_blocks) else "inside the blocks "
    problem = f"names {matching[0]}, a {type(own[matching[0]]).__name__}, and only the matrices {where}can be adapted."
    if any(path.startswith(f"{matching[0]}.") for path in adaptable):
        inside = rf"{target}\..*" if _NAME.fullmatch(target) else rf"({target})\..*"
        return f"{problem} For those in it, write {inside}"
    return f"{problem} They are: {', '.join(last_parts(adaptable))}."


def _refuse_uncovered(own: dict[str, nn.Module], in_blocks: dict[str, tuple[int, int]], model: Any) -> None:
    embeddings = {id(p) for m in own.values() if isinstance(m, nn.Embedding) for p in m.parameters()}
    head = unwrap(model.get_output_embeddings())
    uncovered = [
        f"{path}.{name} in {type(module).__name__}, shape {tuple(parameter.shape)}"
        for path, module in own.items()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim > 1 and id(parameter) not in embeddings and path not in in_blocks and module is not head
    ]
    if uncovered:
        raise NoSuchModule(
            f"targets: all-linear would leave these weights of {type(model).__name__} untouched, because they are not in a "
            f"linear layer:\n{listing(uncovered)}\nName the targets you want instead, for example {', '.join(last_parts(in_blocks))}."
        )


def select_modules(model: nn.Module, candidates: Collection[str], patterns: Sequence[str], key: str) -> set[str]:
    """Those of the candidates that the patterns name or match, themselves or by a module that contains them.

    Args:
        key: What a recipe calls these patterns.

    Raises:
        NoSuchModule: A pattern that selects none.
    """
    selected: set[str] = set()
    for pattern in patterns:
        named = [path for path in base_modules(model) if matches_target(pattern, path)]
        inside = {c for c in candidates if pattern == ALL or any(c == path or c.startswith(f"{path}.") for path in named)}
        if not inside:
            raise NoSuchModule(
                f"{key}: {pattern!r} names none of the modules of {type(model).__name__} that this method trains:\n"
                f"{listing(last_parts(candidates), 12)}"
            )
        selected |= inside
    return selected


def last_parts(paths: Iterable[str]) -> list[str]:
    """The last parts of dotted paths, each once, sorted."""
    return sorted({path.rpartition(".")[2] for path in paths})


def embedding_and_head_shapes(model: Any) -> dict[str, tuple[int, int]]:
    """The token embeddings (vocabulary, hidden) and the head (hidden, vocabulary) by their paths."""
    shapes = {}
    embeddings, head = unwrap(model.get_input_embeddings()), unwrap(model.get_output_embeddings())
    for path, module in base_modules(model).items():
        if module is embeddings:
            shapes[path] = (int(embeddings.num_embeddings), int(embeddings.embedding_dim))  # type: ignore[arg-type]
        elif module is head and (shape := matrix_shape(module)):
            shapes[path] = shape
    return shapes


def matrix_shape(module: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of a module that multiplies by one weight matrix, or None for any other module.

    Besides nn.Linear, that is GPT-2's Conv1D, which stores the matrix transposed and says its sizes as `nx` and `nf`.
    """
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    weight = getattr(module, "weight", None)
    sizes = (getattr(module, "nx", None), getattr(module, "nf", None))
    if isinstance(weight, Tensor) and weight.ndim == 2 and tuple(weight.shape) == sizes:
        return weight.shape[0], weight.shape[1]
    return None


def require_matrix_shape(module: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a module that is one of the targeted matrices."""
    shape = matrix_shape(module)
    assert shape is not None, f"{type(module).__name__} is not a matrix"
    return shape


def trainable_dtype(base: nn.Module | Tensor) -> torch.dtype:
    """The dtype of what is trained beside a weight, or beside a module's first one: float32, or float64 beside float64."""
    weight = base if isinstance(base, Tensor) else next(base.parameters())
    return torch.promote_types(weight.dtype, torch.float32) if weight.is_floating_point() else torch.float32


def weight_matrix(module: nn.Module) -> Tensor:
    """The matrix of a module that has one, an embedding included, as (outputs, inputs) and in at least float32.

    Raises UnsupportedModel if it is quantized: then nothing else is exactly its matrix.
    """
    weight = unwrap(module).weight
    assert isinstance(weight, Tensor)
    if not weight.is_floating_point():
        raise UnsupportedModel(
            f"A {type(unwrap(module)).__name__} is quantized, and this method starts from or changes the weights themselves. "
            "Use one that leaves them as they are, such as lora, or a base that is not quantized."
        )
    weight = weight.to(trainable_dtype(weight))
    return weight if isinstance(unwrap(module), nn.Linear) else weight.T  # Conv1D and Embedding store (inputs, outputs)


def with_weight(module: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy of the model's own module with another matrix: `change` turns its (outputs, inputs) into the new one."""
    changed = change(weight_matrix(module))
    twin = copy.deepcopy(unwrap(module))
    stored = changed if isinstance(twin, nn.Linear) else changed.T
    twin.weight = nn.Parameter(stored.contiguous(), requires_grad=False)
    return twin
