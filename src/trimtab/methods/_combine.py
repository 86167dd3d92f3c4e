"""One LoRA from several: the weighted sum of their changes, exact, or of a smaller rank together with its error."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trimtab.core.errors import RecipeError
from trimtab.methods._attach import Attached, attach_uninitialized, find_adapter
from trimtab.methods._base import Method


class Combined(NamedTuple):
    """A combination, attached and switched on alone."""

    adapter: Attached
    error: float
    """‖sum − combination‖ / ‖sum‖ over all matrices (Frobenius): 0 unless a smaller rank was asked for."""

    @property
    def rank(self) -> int:
        """The largest rank of any matrix."""
        return max(tensor.shape[-2] for name, tensor in self.adapter.state().items() if name.endswith(".A"))


@torch.no_grad()
def combine(model: nn.Module, weights: Mapping[str, float], name: str, rank: int | None = None) -> Combined:
    """Attach the LoRA whose change of each matrix is Σ weight · (the change that the adapter of that name makes).

    Exact by concatenation: A = [A₁; A₂; …], B = [w₁s₁B₁, w₂s₂B₂, …]. Averaging factors, as in Σ wA · Σ wB, would add the
    products of different adapters (PEFT's `linear`). With `rank`, the best approximation of that rank (Eckart and Young 1936).

    Raises:
        RecipeError: A name is not on the model or is no LoRA's, there is none, or `name` is taken.
    """
    if not weights:
        raise RecipeError("There is nothing to combine: name adapters with their weights.")
    factors: dict[
        str, tuple[Tensor, Tensor]
    ] = {}  # by path: A (r, inputs), B (outputs, r), of each expert where there are some; all scales in B
    for addend, weight in weights.items():
        for path, (a, b) in _factors(find_adapter(model, addend)).items():
            b = weight * b
            if path in factors:
                a, b = torch.cat([factors[path][0], a], dim=-2), torch.cat([factors[path][1], b], dim=-1)
            factors[path] = a, b
    error = 0.0
    if rank is not None:
        truncated = {path: _truncate(a, b, rank) for path, (a, b) in factors.items()}
        lost = sum(left_out for _, _, left_out, _ in truncated.values())
        error = (lost / max(sum(total for *_, total in truncated.values()), 1e-300)) ** 0.5
        factors = {path: (a, b) for path, (a, b, *_) in truncated.items()}
    adapter = attach_uninitialized(model, _plain_lora(factors), seed=0, name=name)
    adapter.load_state({f"{path}.{key}": t for path, pair in factors.items() for key, t in zip("AB", pair, strict=True)})
    return Combined(adapter, error)


def _factors(adapter: Attached) -> dict[str, tuple[Tensor, Tensor]]:
    if adapter.method.name != "lora":
        raise RecipeError(f"{adapter.name!r} is of the method {adapter.method.name}, and only changes that LoRA made add up.")
    method, tensors = adapter.to_inference_form()
    scales: Any = method
    paths = dict.fromkeys(key.rpartition(".")[0] for key in tensors)
    return {path: (tensors[f"{path}.A"], scales.scale_of(path) * tensors[f"{path}.B"]) for path in paths}


def _plain_lora(factors: Mapping[str, tuple[Tensor, Tensor]]) -> Method:
    """The method whose scale is 1 for factors of these sizes."""
    ranks = {path: a.shape[-2] for path, (a, _) in factors.items()}
    most_common = max(set(ranks.values()), key=list(ranks.values()).count)
    exceptions = {path: rank for path, rank in ranks.items() if rank != most_common}
    alphas = {path: float(rank) for path, rank in exceptions.items()}
    return Method.member("lora").parse(
        {"rank": most_common, "alpha": float(most_common), "ranks": exceptions, "alphas": alphas, "targets": tuple(factors)}
    )


def _truncate(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """The best factors of a rank for B A, the squared norm of what they leave out, and that of B A."""
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().mT)
    u, s, v = torch.linalg.svd(r_b @ r_a.mT)
    kept = min(rank, s.shape[-1])
    left = (q_b @ (u[..., :kept] * s[..., None, :kept])).to(b.dtype)
    right = (v[..., :kept, :] @ q_a.mT).to(a.dtype)
    return right, left, float((s[..., kept:] ** 2).sum()), float((s**2).sum())
