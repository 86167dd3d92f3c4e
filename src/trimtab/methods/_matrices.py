"""Which matrices of a model a method adapts: `targets`, resolved to module paths or refused; and a module's matrix itself.

A target is `all-linear` (every matrix in the model's blocks, those of fused experts included, but for routers), `attention` (those
in its attention modules), the last parts of dotted names (`q_proj`, `mlp.down_proj`, `layers.0.self_attn.q_proj`), or a regular
expression for the same (`[qv]_proj`, `q_proj|v_proj`, `self_attn\\..*`): it has to match them whole, or the whole path. The matrices of
fused experts have the paths of their parameters (`mlp.experts.down_proj`), and `experts` names them all.
The embeddings and the head are adapted only where a method can, and only if they are named; so are routers that are linear layers. Of a
multimodal wrapper, all of these look inside the text model only.
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
from trimtab.core.errors import NoSuchModule, RecipeError, UnsupportedModel, listing
from trimtab.core.wrapping import base_modules, text_modules, unwrap, whole_shape
from trimtab.methods._experts import MatrixShape, expert_shapes
from trimtab.methods._layers import within_layers
from trimtab.methods._unsuited import unsuited

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


def in_attention(path: str, own: Mapping[str, nn.Module] | None = None) -> bool:
    """Whether a module is inside an attention module, by its name; given the model's modules, by their structure too.

    Attention over the earlier tokens' keys says that it is causal, whatever it is called.
    """
    if not ATTENTION_NAMES.isdisjoint(path.split(".")):
        return True
    while own is not None and path:
        path = path.rpartition(".")[0]
        if getattr(own[path], "is_causal", False) is True:
            return True
    return False


def matrices(model: Any) -> dict[str, MatrixShape]:
    """Every matrix in the model's blocks, those of fused experts included, by path in the model's order."""
    shapes: dict[str, MatrixShape] = {}
    head = unwrap(model.get_output_embeddings())
    for path, module in text_modules(model).items():
        if module is not head and (shape := matrix_shape(module)):
            shapes[path] = MatrixShape(*shape)
        shapes |= {f"{path}.{name}": shape for name, shape in expert_shapes(module).items()}
    return shapes


def find_matrices(
    model: Any,
    targets: Sequence[str],
    *,
    embeddings_and_head: bool = False,
    experts: bool = False,
    key: str = "targets",
    layers: str | None = None,
) -> dict[str, MatrixShape]:
    """The matrices that `targets` name, by path in the model's order.

    Args:
        embeddings_and_head: Whether these may be named too.
        experts: Whether those of fused experts can be adapted.
        key: What a recipe calls these targets.
        layers: Leaves out what is not in these layers.

    Raises:
        NoSuchModule: A target that matches nothing, or something that is not a matrix, or nothing in these layers.
        RecipeError: A target, `all-linear` perhaps, that is a fused expert's matrix, for a method that can't adapt it.
    """
    own, in_blocks = text_modules(model), matrices(model)
    fused = {path: named for path, module in own.items() if (named := [*targeted_experts(path, module, [ALL_LINEAR])])}
    adaptable: dict[str, MatrixShape] = in_blocks | (embedding_and_head_shapes(model) if embeddings_and_head else {})
    chosen: set[str] = set()
    for target in targets:
        if target == ALL_LINEAR:
            left = unsuited(own)
            matching = [path for path in in_blocks if path not in left]
        elif target == ATTENTION:
            whole = base_modules(model)
            left = unsuited(own)
            matching = [path for path in in_blocks if in_attention(path, whole) and path not in left]
        else:
            is_name = _NAME.fullmatch(target)  # an expression may match other modules beside matrices, a name may not
            candidates = {**(own if is_name else {}), **adaptable, **fused}
            named = [path for path in candidates if matches_target(target, path)]
            matching = [matrix for path in named for matrix in fused.get(path, [path])]
        if not matching or not adaptable.keys() >= set(matching):
            raise NoSuchModule(f"{key}: {target!r} {_explain_mismatch(target, model, in_blocks, adaptable)}")
        inside = within_layers(model, layers, matching, f"{key}: {target!r}")
        if not experts:
            refuse_experts({path: adaptable[path] for path in inside}, f"{key}: {target!r}")
        chosen.update(inside)
    in_order = [each for path in own for each in (path, *fused.get(path, []))]
    return {path: adaptable[path] for path in in_order if path in chosen}


def refuse_experts(shapes: Mapping[str, MatrixShape], asked: str) -> None:
    """Raise RecipeError, which begins with what was asked for, if one of these matrices is an expert's."""
    for path, shape in shapes.items():
        if shape.experts:
            raise RecipeError(
                f"{asked} includes {path}, which holds the matrices of {shape.experts} experts in one tensor, and this method adapts only "
                "matrices that are modules of their own. Use lora, dora, miss or ia3, or name other targets, such as those of attention."
            )


def matrix_modules(shapes: Mapping[str, MatrixShape]) -> list[str]:
    """The paths of the modules that hold these matrices, each once: a matrix's own, or that of the experts."""
    return list(dict.fromkeys(path.rpartition(".")[0] if shape.experts else path for path, shape in shapes.items()))


def targeted_experts(path: str, module: nn.Module, targets: Sequence[str]) -> dict[str, MatrixShape]:
    """The matrices of the fused experts at a path that `targets` name, by path; of any other module, none."""

    def named(target: str, matrix: str) -> bool:
        return target == ALL_LINEAR or (target != ATTENTION and any(matches_target(target, at) for at in (path, matrix)))

    shapes = {f"{path}.{name}": shape for name, shape in expert_shapes(module).items()}
    return {matrix: shape for matrix, shape in shapes.items() if any(named(target, matrix) for target in targets)}


def _explain_mismatch(target: str, model: Any, in_blocks: Mapping[str, Any], adaptable: Mapping[str, Any]) -> str:
    """Why a target names no matrices that can be adapted, and what to write instead."""
    own = text_modules(model)
    matching = [path for path in own if path not in adaptable and matches_target(target, path)]
    if not matching and (outside := _unreached(target, model)):
        return outside
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


def _unreached(pattern: str, model: Any) -> str | None:
    """Why a pattern selects nothing, if it names modules of a multimodal wrapper that are not the text model's."""
    text = text_modules(model)
    outside = next((path for path in base_modules(model) if path not in text and matches_target(pattern, path)), None)
    where = f"names {outside}, which is outside the text model of {type(model).__name__}"
    return f"{where}: text examples never reach it, so it would not be trained." if outside else None


def left_frozen(model: Any) -> str:
    """What `all-linear` leaves as it is besides vectors, embeddings and head: kinds of modules with the reasons; "" if nothing."""
    own, left = text_modules(model), unsuited(text_modules(model))
    adapted = {path for path in matrices(model) if path not in left}
    head = unwrap(model.get_output_embeddings())
    kinds: dict[str, int] = {}
    for path, module in own.items():
        weights = [p for name, p in module.named_parameters(recurse=False) if p.ndim > 1 and f"{path}.{name}" not in adapted]
        if not weights or path in adapted or module is head or isinstance(module, nn.Embedding):
            continue
        if expert_shapes(module):
            continue  # what is left of them are biases
        reason = left.get(path, "not a linear layer")
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            reason = "convolution"
        elif "expert" in type(module).__name__.lower():
            reason = "experts without Transformers' interface for them"
        kind = f"{type(module).__name__} ({reason})"
        kinds[kind] = kinds.get(kind, 0) + 1
    return ", ".join(f"{count} × {kind}" for kind, count in kinds.items())


def select_modules(
    model: nn.Module, candidates: Collection[str], patterns: Sequence[str], key: str, layers: str | None = None
) -> set[str]:
    """Those of the candidates that the patterns name or match, themselves or by a module that contains them.

    Args and raises as in `find_matrices`.
    """
    selected: set[str] = set()
    for pattern in patterns:
        named = [path for path in base_modules(model) if matches_target(pattern, path)]
        inside = {c for c in candidates if pattern == ALL or any(c == path or c.startswith(f"{path}.") for path in named)}
        if not inside and (outside := _unreached(pattern, model)):
            raise NoSuchModule(f"{key}: {pattern!r} {outside}")
        if not inside:
            raise NoSuchModule(
                f"{key}: {pattern!r} names none of the modules of {type(model).__name__} that this method trains:\n"
                f"{listing(last_parts(candidates), 12)}"
            )
        selected.update(within_layers(model, layers, inside, f"{key}: {pattern!r}"))
    return selected


def last_parts(paths: Iterable[str]) -> list[str]:
    """The last parts of dotted paths, each once, sorted."""
    return sorted({path.rpartition(".")[2] for path in paths})


def embedding_and_head_shapes(model: Any) -> dict[str, MatrixShape]:
    """The token embeddings (vocabulary, hidden) and the head (hidden, vocabulary) by their paths."""
    shapes = {}
    embeddings, head = unwrap(model.get_input_embeddings()), unwrap(model.get_output_embeddings())
    for path, module in base_modules(model).items():
        if module is embeddings:
            shapes[path] = MatrixShape(int(embeddings.num_embeddings), int(embeddings.embedding_dim))  # type: ignore[arg-type]
        elif module is head and (shape := matrix_shape(module)):
            shapes[path] = MatrixShape(*shape)
    return shapes


def matrix_shape(module: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of a module that multiplies by one weight matrix, or None for any other module.

    Besides nn.Linear, that is GPT-2's Conv1D, which stores the matrix transposed and says its sizes as `nx` and `nf`.
    """
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    weight = getattr(module, "weight", None)
    sizes = (getattr(module, "nx", None), getattr(module, "nf", None))
    if isinstance(weight, Tensor) and len(shape := whole_shape(weight)) == 2 and shape == sizes:
        return shape[0], shape[1]
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
