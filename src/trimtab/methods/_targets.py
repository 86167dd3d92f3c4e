"""Which matrices of a model a method adapts: `targets`, resolved to module paths or refused.

A target is `all-linear` (every matrix in the model's blocks), `attention` (those in its attention modules), the last
parts of dotted names (`q_proj`, `mlp.down_proj`, `layers.0.self_attn.q_proj`), or a regular expression for the same (`[qv]_proj`,
`q_proj|v_proj`, `self_attn\\..*`): it has to match them whole, or the whole path.
The two ends of a model, its embeddings and its head, are adapted only where a method can, and only if they are named.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field
from torch import nn

from trimtab.core.config import as_tuple
from trimtab.core.errors import NoSuchModule, listing
from trimtab.core.wrapping import modules, unwrap
from trimtab.methods._base import matrix_shape

ALL_LINEAR, ATTENTION = "all-linear", "attention"
ATTENTION_NAMES = {"self_attn", "attn", "attention", "self_attention"}
"""What Transformers' causal language models call their attention modules."""

_NAME = re.compile(r"[\w.]+")


def _compiles(targets: Any) -> Any:
    """Every target (every key, of a mapping by target) is a name or a regular expression."""
    for target in targets:
        if not _is_group(target) and not _NAME.fullmatch(target):
            try:
                re.compile(target)
            except re.error as error:
                raise ValueError(f"{target!r} is neither a module name nor a regular expression ({error}).") from None
    return targets


def _is_group(target: str) -> bool:
    return target in (ALL_LINEAR, ATTENTION)


Targets = Annotated[tuple[str, ...], Field(min_length=1), BeforeValidator(as_tuple), AfterValidator(_compiles)]
Patterns = Annotated[tuple[str, ...], BeforeValidator(as_tuple), AfterValidator(_compiles)]
"""Targets, perhaps none."""
ByTarget = AfterValidator(_compiles)
"""Of a mapping: its keys are names or regular expressions, as targets are."""


def matches(pattern: str, path: str) -> bool:
    """Whether a target, other than a group, names or matches a path, or its last parts."""
    if _NAME.fullmatch(pattern):
        return path == pattern or path.endswith(f".{pattern}")
    parts = path.split(".")
    return any(re.fullmatch(pattern, ".".join(parts[first:])) for first in range(len(parts)))


def matrices(model: Any, targets: Sequence[str], *, ends: bool = False, key: str = "targets") -> dict[str, tuple[int, int]]:
    """The matrices that `targets` name: path -> (inputs, outputs), in the model's order.

    Args:
        key: What a recipe calls these targets.
        ends: The token embeddings and the head may be named too.

    Raises:
        NoSuchModule: A target that matches nothing, or something that is not a matrix; or `all-linear` on a model
            with blocks that hold other weights (fused experts, say), which would silently stay as they are.
    """
    everything = modules(model)
    head = unwrap(model.get_output_embeddings())
    shapes = {path: shape for path, module in everything.items() if (shape := matrix_shape(module)) and module is not head}
    named = shapes | (end_matrices(model) if ends else {})
    chosen: set[str] = set()
    for target in targets:
        if target == ALL_LINEAR:
            _refuse_uncovered(everything, shapes, model)
            matching = list(shapes)
        elif target == ATTENTION:
            matching = [path for path in shapes if ATTENTION_NAMES & set(path.split("."))]
        else:
            exact = _NAME.fullmatch(target)  # an expression may match other modules beside matrices, a name may not
            matching = [path for path in (everything if exact else named) if matches(target, path)]
        if not matching or not named.keys() >= set(matching):
            raise NoSuchModule(f"{key}: {target!r} {_why_none(target, model, shapes, named)}")
        chosen.update(matching)
    return {path: named[path] for path in everything if path in chosen}


def _why_none(target: str, model: Any, shapes: Mapping[str, Any], named: Mapping[str, Any]) -> str:
    """Why a target names no matrices that can be adapted, and what to write instead.

    Args:
        shapes: The matrices in the model's blocks.
        named: All that can be adapted: also its two ends, for methods that adapt those.
    """
    everything = modules(model)
    found = [path for path in everything if path not in named and matches(target, path)]
    if not found:
        near = difflib.get_close_matches(target, {path.rpartition(".")[2] for path in named}, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        if not _NAME.fullmatch(target):
            hint = " A regular expression has to match a module's path or its last parts, such as mlp.down_proj, whole."
        return f"matches no module of {type(model).__name__}.{hint} It has: {_names(shapes)}."
    where = "" if len(named) > len(shapes) else "inside the blocks "
    what = f"names {found[0]}, a {type(everything[found[0]]).__name__}, and only the matrices {where}can be adapted."
    if any(path.startswith(f"{found[0]}.") for path in named):
        inside = rf"{target}\..*" if _NAME.fullmatch(target) else rf"({target})\..*"
        return f"{what} For those in it, write {inside}"
    return f"{what} They are: {_names(named)}."


def end_matrices(model: Any) -> dict[str, tuple[int, int]]:
    """The token embeddings (vocabulary, hidden) and the head (hidden, vocabulary) by their paths."""
    ends = {}
    embeddings, head = unwrap(model.get_input_embeddings()), unwrap(model.get_output_embeddings())
    for path, module in modules(model).items():
        if module is embeddings:
            ends[path] = (int(embeddings.num_embeddings), int(embeddings.embedding_dim))  # type: ignore[arg-type]
        elif module is head and (shape := matrix_shape(module)):
            ends[path] = shape
    return ends


def _names(shapes: Iterable[str]) -> str:
    return ", ".join(sorted({path.rpartition(".")[2] for path in shapes}))


def _refuse_uncovered(everything: dict[str, nn.Module], shapes: dict[str, tuple[int, int]], model: Any) -> None:
    embeddings = {id(p) for m in everything.values() if isinstance(m, nn.Embedding) for p in m.parameters()}
    head = unwrap(model.get_output_embeddings())
    uncovered = [
        f"{path}.{name} in {type(module).__name__}, shape {tuple(parameter.shape)}"
        for path, module in everything.items()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim > 1 and id(parameter) not in embeddings and path not in shapes and module is not head
    ]
    if uncovered:
        raise NoSuchModule(
            f"targets: all-linear would leave these weights of {type(model).__name__} untouched, because they are not in a "
            f"linear layer:\n{listing(uncovered)}\nName the targets you want instead, for example {_names(shapes)}."
        )
