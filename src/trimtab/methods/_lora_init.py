"""Initial values of LoRA's A and B: normal numbers, from the model's matrices (PiSSA), or from their inputs (EVA).

Shapes: r rank, n inputs and m outputs of a matrix, T tokens.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.attention import without_cudnn
from trimtab.core.errors import RecipeError
from trimtab.methods import AdapterLayer, unwrap, weight_matrix
from trimtab.methods._lowrank import LowRankLayer

TOKENS = 4096
"""How many tokens' inputs are used."""
MAX_NUMBERS = 250_000_000
"""How many numbers of Xᵀ X are held at a time: 1 GB of float32."""


@torch.no_grad()
def draw_gaussian(layer: AdapterLayer) -> None:
    """Draw each A (… r n) from N(0, 1/r²), as PEFT's init_lora_weights="gaussian" does; an embedding's A stays zero, and B normal."""
    for name, parameter in layer.own_parameters().items():
        if name.rpartition(".")[2] == "A" and not isinstance(unwrap(layer), nn.Embedding):
            parameter.normal_(std=1 / parameter.shape[-2])


@torch.no_grad()
def principal_factors(module: nn.Module, rank: int, scale: float, path: str) -> tuple[Tensor, Tensor]:
    """A (r n) and B (m r) with scale · B A = U_r S_r V_rᵀ, the best approximation of rank r to the matrix; each has half of S_r.

    Meng et al. 2024, "PiSSA", arXiv:2404.02948. Exact: 0.14 s for 1536 × 576 on two cores.

    Raises:
        RecipeError: The matrix has no r singular values.
    """
    weight = weight_matrix(module)
    if rank > min(weight.shape):
        raise RecipeError(f"init: pissa needs a rank of at most {min(weight.shape)}, the smaller side of {path}; it is {rank}.")
    U, S, Vt = torch.linalg.svd(weight, full_matrices=False)
    half = (S[:rank] / scale).sqrt()
    return half[:, None] * Vt[:rank], U[:, :rank] * half


@torch.no_grad()
def init_from_inputs(model: Any, layers: dict[str, AdapterLayer], rows: Sequence[Sequence[int]]) -> None:
    """Set each layer's A to the top right-singular vectors of its inputs (T n) on the rows; B stays zero.

    Paischer et al. 2024, "EVA", arXiv:2410.07170, on the rows' first tokens and without moving ranks between layers.

    Raises:
        RecipeError: There are no rows, too few tokens for the rank, or a layer adapts an embedding.
    """
    chosen, remaining = [], TOKENS
    for row in rows:
        chosen.append(list(row)[:remaining])
        remaining -= len(chosen[-1])
        if remaining <= 0:
            break
    tokens = TOKENS - remaining
    if not tokens:
        raise RecipeError("init: eva starts from training examples, and there are none: give attach(…, sample=Sample(rows=…)).")
    adapted = {path: layer for path, layer in layers.items() if isinstance(layer, LowRankLayer)}
    for path, layer in adapted.items():
        rank, inputs = layer.A.shape
        if isinstance(unwrap(layer), nn.Embedding):
            raise RecipeError(
                f"init: eva uses the inputs of a matrix, and those of {path} are tokens: leave it out of targets."
            )
        if rank > min(tokens, inputs):
            raise RecipeError(
                f"init: eva needs a rank of at most {min(tokens, inputs)} for {path}, which has {inputs} inputs "
                f"and is given {tokens} tokens; it is {rank}."
            )
    for group in _groups(adapted):
        for path, products in _products(model, group, chosen).items():
            A = adapted[path].A
            A.copy_(torch.linalg.eigh(products).eigenvectors[:, -len(A) :].flip(1).T)


def _products(model: Any, layers: dict[str, LowRankLayer], rows: list[list[int]]) -> dict[str, Tensor]:
    """Xᵀ X (n n) of the inputs X of each layer: its eigenvectors are the right-singular vectors of X."""
    products = {path: layer.A.new_zeros(2 * layer.A.shape[1:]) for path, layer in layers.items()}

    def record(path: str) -> Any:
        def hook(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0].flatten(0, -2).to(products[path].dtype)
            products[path].addmm_(x.T, x)

        return hook

    hooks = [layer.register_forward_pre_hook(record(path)) for path, layer in layers.items()]
    try:
        for row in rows:
            with without_cudnn():
                model(input_ids=torch.tensor([row], device=next(model.parameters()).device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return products


def _groups(layers: dict[str, LowRankLayer]) -> Iterator[dict[str, LowRankLayer]]:
    """The layers in groups whose products of inputs fit into memory together."""
    group: dict[str, LowRankLayer] = {}
    held = 0
    for path, layer in layers.items():
        size = layer.A.shape[1] ** 2
        if group and held + size > MAX_NUMBERS:
            yield group
            group, held = {}, 0
        group[path] = layer
        held += size
    yield group
