"""LoRA and its variants: hyperparameters, the factors of a low-rank change B A, and PEFT's LORA format."""

import math
import re
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from trimtab.core.errors import NoSuchModule
from trimtab.methods import (
    ALL_LINEAR,
    AdapterLayer,
    ByTarget,
    LearningRateContext,
    MatrixShape,
    Method,
    Targets,
    base_modules,
    find_matrices,
    matches_target,
    matrix_modules,
    require_matrix_shape,
    shortest_names,
    targeted_experts,
    to_peft_names,
    trainable_dtype,
    unwrap,
    with_weight,
)
from trimtab.methods._experts import expert_shapes
from trimtab.methods._experts_layer import ExpertMatrices, ExpertPart, ExpertsLayer
from trimtab.methods._layers import Layers
from trimtab.methods._matrices import last_parts
from trimtab.methods._peft_experts import experts_from_peft, experts_to_peft, match_pattern, parameters_in_peft


class LowRank(Method):
    """The hyperparameters that LoRA's variants share."""

    peft_type: ClassVar[str | None] = "LORA"
    peft_names: ClassVar[dict[str, str]] = {"A": "lora_A.weight", "B": "lora_B.weight"}
    peft_variant: ClassVar[dict[str, Any]] = {}
    """Keys of PEFT's LORA configuration that make it this variant."""

    rank: Annotated[int, Field(ge=1)] = 32
    """Rank r of the change."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """The change is scaled by alpha / rank, so that the best learning rate hardly depends on the rank."""
    rank_stabilized: bool = False
    """Scale by alpha / √rank instead (rsLoRA, Kalajdzievski 2023, arXiv:2312.03732): large ranks then still train well."""
    ranks: Annotated[dict[str, Annotated[int, Field(ge=1)]], ByTarget] = Field(default_factory=dict)
    """Other ranks for some of the targets, by name or regular expression: {down_proj: 64}. The first that matches counts."""
    alphas: Annotated[dict[str, Annotated[float, Field(gt=0)]], ByTarget] = Field(default_factory=dict)
    """Other alphas for some of the targets, in the same way."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout probability of A's inputs in training; an embedding's inputs, tokens, are not dropped."""
    b_rate: Annotated[float, Field(gt=0)] = 1.0
    """Factor on the learning rate of B (LoRA+, Hayou et al. 2024, arXiv:2402.12354, which advises about 16)."""
    targets: Targets = (ALL_LINEAR,)
    """Which matrices: `all-linear`, `attention`, names such as `q_proj`, or regular expressions, such as `[qv]_proj`.

    The embeddings and the head are adapted if they are named (`embed_tokens`, `lm_head`), each on its own even where they are tied.
    Of a mixture of experts, `all-linear` adapts every expert and leaves the router, which chooses among them, as it is.
    """
    layers: Layers = None

    def shapes(self, model: nn.Module) -> dict[str, MatrixShape]:
        """The targeted matrices by path. Raises NoSuchModule for a pattern that matches none of them."""
        shapes = find_matrices(model, self.targets, embeddings_and_head=True, experts=True, layers=self.layers)
        for key, patterns in (("ranks", self.ranks), ("alphas", self.alphas)):
            for pattern in patterns:
                if not any(matches_target(pattern, path) for path in shapes):
                    raise NoSuchModule(f"{key}: {pattern!r} matches none of the targets: {', '.join(last_parts(shapes))}.")
        return shapes

    def experts_layer(self, base: nn.Module, path: str, part: "type[LowRankExperts]") -> ExpertsLayer | None:
        """The layer around fused experts, each matrix with its part; None for any other module."""
        matrices = targeted_experts(path, base, self.targets)
        parts = {at: part(base, at.rpartition(".")[2], self.rank_of(at), self.scale_of(at), self.dropout) for at in matrices}
        return ExpertsLayer(base, {at.rpartition(".")[2]: made for at, made in parts.items()}) if parts else None

    def rank_of(self, path: str) -> int:
        return next((rank for pattern, rank in self.ranks.items() if matches_target(pattern, path)), self.rank)

    def alpha_of(self, path: str) -> float:
        return next((alpha for pattern, alpha in self.alphas.items() if matches_target(pattern, path)), self.alpha)

    def scale_of(self, path: str) -> float:
        rank = self.rank_of(path)
        return self.alpha_of(path) / (math.sqrt(rank) if self.rank_stabilized else rank)

    def sites(self, model: nn.Module) -> list[str]:
        return matrix_modules(self.shapes(model))

    def parameter_count(self, model: nn.Module) -> int:
        """Σ rank · (inputs + outputs) over the targeted matrices, each expert's counted."""
        return sum(self.rank_of(path) * (at.inputs + at.outputs) * at.copies for path, at in self.shapes(model).items())

    def lr_multiplier(self, name: str) -> float:
        return self.b_rate if name == "B" else 1.0

    def learning_rate(self, at: LearningRateContext) -> tuple[float, str]:
        """lr = 5e-4 · (2000 / hidden)^p, at most 2e-3.

        Fitted by the Tinker cookbook (`hyperparam_utils.py`) for alpha 32 with p = 0.0775 for Qwen and 0.781 for Llama; for
        other families it is 3e-4. Neither the rank nor the rows of a step change it: see docs/decisions/052.
        """
        exponent = next((p for name, p in (("qwen", 0.0775), ("llama", 0.781)) if name in at.model_type), None)
        if exponent is None:
            return 3e-4, "3e-4 for this architecture"
        rate = min(2e-3, 5e-4 * (2000 / at.hidden_size) ** exponent)
        return float(f"{rate:.2e}"), f"5e-4·(2000/{at.hidden_size})^{exponent}, at most 2e-3"

    @classmethod
    def recognizes(cls, config: dict[str, Any]) -> bool:
        return config.get("peft_type") == "LORA" and bool(config.get("use_dora")) == bool(cls.peft_variant.get("use_dora"))

    def to_peft(self, model: nn.Module, tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        own, shapes = base_modules(model), self.shapes(model)
        parameters = parameters_in_peft(own, shapes)
        key_of = {path: parameters.get(path, path) for path in shapes}
        settings = {
            "r": self.rank,
            "lora_alpha": _as_int(self.alpha),
            "rank_pattern": {key_of[path]: self.rank_of(path) for path in shapes if self.rank_of(path) != self.rank},
            "alpha_pattern": {
                key_of[path]: _as_int(self.alpha_of(path)) for path in shapes if self.alpha_of(path) != self.alpha
            },
            "lora_dropout": self.dropout,
            "target_modules": shortest_names(model, [path for path in shapes if path not in parameters]),
            "fan_in_fan_out": any(not isinstance(own[p], nn.Linear | nn.Embedding) for p in shapes if p not in parameters),
            "bias": "none",
            "use_rslora": self.rank_stabilized,
            "use_dora": False,
            **self.peft_variant,
        }
        if parameters:  # PEFT has no dropout for them; it acts in training alone, and our own manifest has it
            settings |= {"target_parameters": list(parameters.values()), "lora_dropout": 0.0}
        in_embedding = {**self.peft_names, "A": "lora_embedding_A", "B": "lora_embedding_B"}
        renamed: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            is_embedding = isinstance(own.get(key.rpartition(".")[0]), nn.Embedding)
            renamed |= to_peft_names({key: tensor}, in_embedding if is_embedding else self.peft_names)
        if parameters and (self.peft_variant or settings["fan_in_fan_out"]):
            return self.trimtab_only_config(), renamed
        return self.peft_config(**settings), experts_to_peft(renamed, shapes)

    @classmethod
    def from_peft(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[Self, dict[str, Tensor]]:
        as_matrices = {re.sub(r"lora_embedding_([AB])$", r"lora_\1.weight", key): tensor for key, tensor in tensors.items()}
        as_matrices, key_of = experts_from_peft(config, as_matrices)
        honoured = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "lora_dropout", "use_rslora", "use_dora"}
        renamed, paths = cls.read_peft(
            config,
            as_matrices,
            honoured=honoured | ({"target_parameters"} if key_of else set()),
            neutral={
                "bias": ("none",),
                # These decide where training began, not what the adapter computes; the other values change the base as well.
                "init_lora_weights": (True, "gaussian", "eva", "orthogonal"),
                "qalora_group_size": (16,),  # read with use_qalora alone
                "runtime_config": ({"ephemeral_gpu_offload": False},),
                "megatron_core": ("megatron.core",),  # read with megatron_config alone, and never by us
            },
            ignored={"fan_in_fan_out", "eva_config"},
        )
        patterns = {
            path: [match_pattern(config.get(key), key_of.get(path, path)) for key in ("rank_pattern", "alpha_pattern")]
            for path in paths
        }
        method = cls.parse(
            {
                "rank": config.get("r", 8),
                "alpha": config.get("lora_alpha", 8),
                "rank_stabilized": bool(config.get("use_rslora")),
                "ranks": {path: rank for path, (rank, _) in patterns.items() if rank is not None},
                "alphas": {path: alpha for path, (_, alpha) in patterns.items() if alpha is not None},
                "dropout": config.get("lora_dropout", 0.0),
                # The tensors say exactly which modules are adapted; PEFT's patterns could match others of our base.
                "targets": paths,
            }
        )
        return method, renamed


class LowRankLayer(AdapterLayer):
    """Factors A (rank, inputs) and B (outputs, rank) beside a matrix; B A starts at zero, whichever of the two does.

    They are float32 even on a base of fewer bits.
    """

    def __init__(self, base: nn.Module, rank: int, scale: float, dropout: float) -> None:
        super().__init__(base)
        self.scale = scale
        self.dropout = nn.Dropout(dropout)
        dtype = trainable_dtype(base)
        inputs, outputs = (
            (base.num_embeddings, base.embedding_dim) if isinstance(base, nn.Embedding) else require_matrix_shape(base)
        )
        self.A = nn.Parameter(torch.zeros(rank, inputs, dtype=dtype))
        self.B = nn.Parameter(torch.zeros(outputs, rank, dtype=dtype))
        if isinstance(base, nn.Embedding):
            nn.init.normal_(self.B)  # as loralib does: a row of A is met only by its own token
        else:
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))  # U(±1/√inputs), as in the authors' loralib

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B of the change."""
        return self.A, self.B

    def add(self, y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """y + scale · drop(x) Aᵀ Bᵀ; of an embedding, whose x are tokens, y + scale · A[:, x]ᵀ Bᵀ."""
        if x.is_floating_point():
            inner = F.linear(self.dropout(x), A.to(x.dtype))
        else:
            inner = F.embedding(x, A.T) * getattr(unwrap(self.base), "embed_scale", 1.0)  # Gemma's multiply what they look up
        expand = (self.scale * B).to(y.dtype).T
        return torch.addmm(y.flatten(0, -2), inner.to(y.dtype).flatten(0, -2), expand).view_as(y)  # one pass over y, not three

    @torch.no_grad()
    def change(self) -> Tensor:
        """What is added to the matrix, (outputs, inputs)."""
        A, B = self.factors()
        return self.scale * B @ A

    @torch.no_grad()
    def merge(self) -> nn.Module:
        return with_weight(self.base, lambda weight: weight + self.change())


class LowRankExperts(ExpertPart):
    """Factors A (experts, rank, inputs) and B (experts, outputs, rank) beside a matrix of each expert; B starts at zero."""

    def __init__(self, base: nn.Module, name: str, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.scale = scale
        self.dropout = nn.Dropout(dropout)
        inputs, outputs, experts = expert_shapes(base)[name]
        dtype = trainable_dtype(base)
        self.A = nn.Parameter(torch.empty(experts, rank, inputs, dtype=dtype).uniform_(-1, 1) / math.sqrt(inputs))
        self.B = nn.Parameter(torch.zeros(experts, outputs, rank, dtype=dtype))

    def add(self, y: Tensor, x: Tensor, at: ExpertMatrices, B: Tensor) -> Tensor:
        """y + scale · drop(x) Aᵀ Bᵀ, with A and B of each row's expert."""
        fill = -self.A.shape[1] % 8  # zeros, for torch's grouped product
        inner = at.rows.times(self.dropout(x), F.pad(self.A, (0, 0, 0, fill)).to(x.dtype))
        return y + at.rows.times(inner, F.pad(self.scale * B, (0, fill)).to(x.dtype))

    def adapt(self, base: Callable[[Tensor], Tensor], at: ExpertMatrices, x: Tensor) -> Tensor:
        return self.add(base(x), x, at, self.B)

    def merged(self, weight: Tensor) -> Tensor:
        return weight + self.scale * self.B @ self.A


def _as_int(number: float) -> float:
    return int(number) if number.is_integer() else number
