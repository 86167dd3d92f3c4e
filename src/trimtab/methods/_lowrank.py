"""What the methods that add a low-rank change B A to a matrix have in common: hyperparameters, factors, PEFT's LORA format."""

import math
import re
from typing import Annotated, Any, ClassVar, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from trimtab.core.errors import NoSuchModule
from trimtab.core.wrapping import modules, unwrap
from trimtab.methods._base import AdapterLayer, LearningRateContext, Method, matrix_shape, with_weight
from trimtab.methods._peft import SELECTING, from_names, only_known, shortest_names, to_names
from trimtab.methods._targets import ALL_LINEAR, ByTarget, Targets, matches, matrices

NAMES = {
    "A": "lora_A.weight",
    "B": "lora_B.weight",
    "magnitude": "lora_magnitude_vector",
}
"""PEFT's names of ours, in a matrix."""
EMBEDDING_NAMES = {**NAMES, "A": "lora_embedding_A", "B": "lora_embedding_B"}
"""The same in an embedding."""


class LowRank(Method):
    """The part of LoRA's hyperparameters that its variants share."""

    peft_type: ClassVar[str | None] = "LORA"
    asks_of_peft: ClassVar[dict[str, Any]] = {}
    """Keys of PEFT's LORA configuration that make it this variant."""

    rank: Annotated[int, Field(ge=1)] = 32
    """Rank r of the change."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """The change is scaled by alpha / rank, so the best learning rate hardly depends on the rank."""
    rank_stabilized: bool = False
    """Scale by alpha / √rank instead (rsLoRA, Kalajdzievski 2023, arXiv:2312.03732): large ranks then keep learning."""
    ranks: Annotated[dict[str, Annotated[int, Field(ge=1)]], ByTarget] = Field(default_factory=dict)
    """Other ranks for some of the targets, by name or regular expression: {down_proj: 64}. The first that matches counts."""
    alphas: Annotated[dict[str, Annotated[float, Field(gt=0)]], ByTarget] = Field(default_factory=dict)
    """Other alphas for some of the targets, in the same way."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability with which a number that enters A is dropped in training; tokens, which enter an embedding's, are not."""
    b_rate: Annotated[float, Field(gt=0)] = 1.0
    """B learns at this many times the learning rate (LoRA+, Hayou et al. 2024, arXiv:2402.12354, which advises about 16)."""
    targets: Targets = (ALL_LINEAR,)
    """Which matrices: `all-linear`, `attention`, names such as `q_proj`, or regular expressions, such as `[qv]_proj`.

    The embeddings and the head are adapted if they are named (`embed_tokens`, `lm_head`), each on its own even where they are tied.
    """

    def shapes(self, model: nn.Module) -> dict[str, tuple[int, int]]:
        """The targeted matrices: path -> (inputs, outputs). Raises NoSuchModule for a pattern that matches none of them."""
        found = matrices(model, self.targets, ends=True)
        for key, patterns in (("ranks", self.ranks), ("alphas", self.alphas)):
            for pattern in patterns:
                if not any(matches(pattern, path) for path in found):
                    raise NoSuchModule(f"{key}: {pattern!r} matches none of the targets: {', '.join(_lasts(found))}.")
        return found

    def rank_of(self, path: str) -> int:
        return next((rank for pattern, rank in self.ranks.items() if matches(pattern, path)), self.rank)

    def alpha_of(self, path: str) -> float:
        return next((alpha for pattern, alpha in self.alphas.items() if matches(pattern, path)), self.alpha)

    def scale_of(self, path: str) -> float:
        rank = self.rank_of(path)
        return self.alpha_of(path) / (math.sqrt(rank) if self.rank_stabilized else rank)

    def sites(self, model: nn.Module) -> list[str]:
        return list(self.shapes(model))

    def parameter_count(self, model: nn.Module) -> int:
        """Σ rank · (inputs + outputs) over the targeted matrices."""
        return sum(self.rank_of(path) * (inputs + outputs) for path, (inputs, outputs) in self.shapes(model).items())

    def lr_multiplier(self, name: str) -> float:
        return self.b_rate if name == "B" else 1.0

    def learning_rate(self, at: LearningRateContext) -> tuple[float, str]:
        """lr = 5e-4 · (2000 / hidden)^p · √(rows per step / 32), at most 2e-3.

        The first two factors are fitted by the Tinker cookbook (`hyperparam_utils.py`) for alpha 32 with p = 0.0775 for
        Qwen and 0.781 for Llama; for other families 3e-4 stands in their place. The third is the square-root rule for
        the batch, anchored at 32 rows rather than at their 128: see the measurement in docs/log.md.
        """
        exponent = next((p for name, p in (("qwen", 0.0775), ("llama", 0.781)) if name in at.model_type), None)
        fitted = 3e-4 if exponent is None else 5e-4 * (2000 / at.hidden_size) ** exponent
        words = "3e-4" if exponent is None else f"5e-4·(2000/{at.hidden_size})^{exponent}"
        rate = min(2e-3, fitted * math.sqrt(at.rows_per_step / 32))
        return float(f"{rate:.2e}"), f"{words}·√({at.rows_per_step:.3g} rows a step/32), at most 2e-3"

    @classmethod
    def reads(cls, config: dict[str, Any]) -> bool:
        return config.get("peft_type") == "LORA" and bool(config.get("use_dora")) == bool(cls.asks_of_peft.get("use_dora"))

    def to_peft(self, model: nn.Module, tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        everything, shapes = modules(model), self.shapes(model)
        config = {
            "peft_type": self.peft_type,
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "r": self.rank,
            "lora_alpha": _whole(self.alpha),
            "rank_pattern": {path: self.rank_of(path) for path in shapes if self.rank_of(path) != self.rank},
            "alpha_pattern": {path: _whole(self.alpha_of(path)) for path in shapes if self.alpha_of(path) != self.alpha},
            "lora_dropout": self.dropout,
            "target_modules": shortest_names(list(shapes), list(everything)),
            "fan_in_fan_out": any(not isinstance(everything[path], nn.Linear | nn.Embedding) for path in shapes),
            "bias": "none",
            "use_rslora": self.rank_stabilized,
            "use_dora": False,
            **self.asks_of_peft,
        }
        renamed: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            is_embedding = isinstance(everything[key.rpartition(".")[0]], nn.Embedding)
            renamed |= to_names({key: tensor}, EMBEDDING_NAMES if is_embedding else NAMES)
        return config, renamed

    @classmethod
    def from_peft(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[Self, dict[str, Tensor]]:
        only_known(
            config,
            honoured={"r", "lora_alpha", "rank_pattern", "alpha_pattern", "lora_dropout", "use_rslora", "use_dora"},
            neutral={
                "bias": ("none",),
                # These decide where training began, not what the adapter computes; others change the base as well.
                "init_lora_weights": (True, "gaussian", "eva", "orthogonal"),
                "qalora_group_size": (16,),  # read with use_qalora alone
                "runtime_config": ({"ephemeral_gpu_offload": False},),
                "megatron_core": ("megatron.core",),  # read with megatron_config alone, and never by us
            },
            ignored={"fan_in_fan_out", "eva_config", *SELECTING},
        )
        names = {name: theirs for name, theirs in NAMES.items() if name != "magnitude" or cls.asks_of_peft.get("use_dora")}
        alike = {re.sub(r"lora_embedding_([AB])$", r"lora_\1.weight", key): tensor for key, tensor in tensors.items()}
        renamed, paths = from_names(alike, names, "LoRA")
        patterns = {path: [_of_pattern(config.get(key), path) for key in ("rank_pattern", "alpha_pattern")] for path in paths}
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
        weight = next(base.parameters())
        kind = torch.promote_types(weight.dtype, torch.float32) if weight.is_floating_point() else torch.float32
        if isinstance(base, nn.Embedding):
            inputs, outputs = base.num_embeddings, base.embedding_dim
        else:
            shape = matrix_shape(base)
            assert shape is not None, f"{type(base).__name__} is not a matrix"
            inputs, outputs = shape
        self.A = nn.Parameter(torch.zeros(rank, inputs, dtype=kind))
        self.B = nn.Parameter(torch.zeros(outputs, rank, dtype=kind))
        if isinstance(base, nn.Embedding):
            nn.init.normal_(self.B)  # as loralib does: a row of A is met only by its own token
        else:
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))  # U(±1/√inputs), as in the authors' loralib

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B of the change that is made."""
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
    def merged(self) -> nn.Module:
        return with_weight(self.base, lambda weight: weight + self.change())


def _of_pattern(patterns: dict[str, Any] | None, path: str) -> Any:
    """What PEFT's `rank_pattern` or `alpha_pattern` says of a path, if anything."""
    return next((value for pattern, value in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", path)), None)


def _lasts(paths: dict[str, Any]) -> list[str]:
    return sorted({path.rpartition(".")[2] for path in paths})


def _whole(number: float) -> float:
    return int(number) if number.is_integer() else number
