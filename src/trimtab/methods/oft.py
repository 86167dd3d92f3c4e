"""OFT: a trained rotation of each matrix's inputs, block by block.

Qiu et al. 2023, "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", arXiv:2306.07280; turning the inputs, and by a
series in place of the inverse, as in Qiu et al. 2025, "Orthogonal Finetuning Made Scalable", arXiv:2506.19847.
"""

import math
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from trimtab.core.errors import ArtifactError, RecipeError
from trimtab.methods import (
    AdapterLayer,
    MatrixMethod,
    MatrixShape,
    require_matrix_shape,
    trainable_dtype,
    with_weight,
)


class OFT(MatrixMethod):
    """Multiplies blocks of each targeted matrix's inputs by trained orthogonal matrices, which start as the identity."""

    peft_type: ClassVar[str | None] = "OFT"
    peft_names: ClassVar[dict[str, str]] = {"Q": "oft_R.weight"}
    auto_lr: ClassVar[str] = "1e-3"
    auto_lr_overshoots: ClassVar[bool] = True

    block_size: Annotated[int, Field(ge=2)] = 32
    """How many inputs one rotation mixes. Must divide every target's inputs."""
    shared: bool = False
    """Whether all blocks of a matrix share one rotation."""
    cayley: Literal["neumann", "exact"] = "neumann"
    """How a rotation is computed from its parameters: by five terms of a series, nearly orthogonal and fast, or exactly."""

    def shapes(self, model: nn.Module) -> dict[str, MatrixShape]:
        shapes = super().shapes(model)
        common = math.gcd(*(shape.inputs for shape in shapes.values()))
        for path, (inputs, *_) in shapes.items():
            if inputs % self.block_size:
                fitting = ", ".join(str(size) for size in range(2, common + 1) if common % size == 0) or "nothing"
                problem = f"{self.block_size} does not divide the {inputs} inputs of {path}"
                raise RecipeError(f"block_size: {problem}. What divides the inputs of all targets: {fitting}.")
        return shapes

    def layer(self, base: nn.Module, path: str) -> "OFTLayer":
        return OFTLayer(base, self.block_size, self.shared, self.cayley == "exact")

    def parameter_count(self, model: nn.Module) -> int:
        """Σ blocks · size · (size − 1) / 2 over the targeted matrices, which have one block each if it is shared."""
        blocks = (1 if self.shared else shape.inputs // self.block_size for shape in self.shapes(model).values())
        return sum(blocks) * (self.block_size * (self.block_size - 1) // 2)

    def peft_settings(self) -> dict[str, Any]:
        return {
            "peft_version": "0.18.0",  # the first whose series this is
            "r": 0,
            "oft_block_size": self.block_size,
            "block_share": self.shared,
            "use_cayley_neumann": self.cayley == "neumann",
            "num_cayley_neumann_terms": 5,
        }

    @classmethod
    def from_peft(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[Self, dict[str, Tensor]]:
        series = config.get("use_cayley_neumann", True)
        terms = 5 if series else config.get("num_cayley_neumann_terms")  # read with the series alone
        renamed, paths = cls.read_peft(
            config,
            tensors,
            honoured={"block_share", "use_cayley_neumann"},
            neutral={"bias": ("none",), "num_cayley_neumann_terms": (terms,)},
            # PEFT fits a block size to each matrix where it must, so the tensors say it; its dropout is never called.
            ignored={"r", "oft_block_size", "init_weights", "module_dropout", "eps", "fan_in_fan_out"},
        )
        sizes = {(1 + math.isqrt(1 + 8 * renamed[f"{path}.Q"].shape[-1])) // 2 for path in paths}
        if len(sizes) > 1:
            raise ArtifactError(f"oft_block_size: PEFT has made it {sorted(sizes)} in different matrices; Trimtab has one.")
        method = {"block_size": sizes.pop(), "shared": bool(config.get("block_share")), "targets": paths}
        return cls.parse(method | {"cayley": "neumann" if series else "exact"}), renamed


class OFTLayer(AdapterLayer):
    """y = base(x R), R block-diagonal. A block's parameters (size · (size − 1) / 2) are what is above the diagonal of a skew Q.

    Exactly, R = (I − Q)(I + Q)⁻¹; by the series, I + 2Q + 2Q² + 2Q³ + Q⁴ ≈ (I + Q)(I − Q)⁻¹, its inverse, as in PEFT.
    """

    def __init__(self, base: nn.Module, size: int, shared: bool, exact: bool) -> None:
        super().__init__(base)
        self.size, self.exact, self.blocks = size, exact, require_matrix_shape(base)[0] // size
        count = 1 if shared else self.blocks
        self.Q = nn.Parameter(torch.zeros(count, size * (size - 1) // 2, dtype=trainable_dtype(base)))

    def rotation_change(self) -> Tensor:
        """R − I of every block: blocks size size. Without the I, small rotations keep their digits in bfloat16."""
        above = self.Q.new_zeros(len(self.Q), self.size, self.size)
        rows, columns = torch.triu_indices(self.size, self.size, 1, device=self.Q.device)
        above[:, rows, columns] = self.Q
        Q = above - above.mT
        eye, square = torch.eye(self.size, dtype=Q.dtype, device=Q.device), Q @ Q
        series = 2 * (Q + square + square @ Q) + square @ square
        change = torch.linalg.solve(eye + Q, -2 * Q, left=False) if self.exact else series
        return change.expand(self.blocks, -1, -1)

    def times(self, x: Tensor, matrices: Tensor) -> Tensor:
        """Each block of x's last dimension times its matrix."""
        return torch.einsum("...nk,nkc->...nc", x.unflatten(-1, (self.blocks, self.size)), matrices.to(x.dtype)).flatten(-2)

    def adapt(self, x: Tensor) -> Tensor:
        return self.base(x + self.times(x, self.rotation_change()))

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """W Rᵀ in W's place."""
        transposed = self.rotation_change().mT
        return with_weight(self.base, lambda weight: weight + self.times(weight, transposed))
