"""LoRA: a trainable low-rank change of a frozen weight matrix.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, equation 3.
"""

import copy
import math
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from trimtab.errors import ArtifactError
from trimtab.methods._base import AdapterLayer, Circumstances, Method, matrix_shape, modules, only_known
from trimtab.methods._targets import ALL_LINEAR, Targets, matrices

PEFT_PREFIX = "base_model.model."
PEFT_NAMES = {"A": "lora_A.weight", "B": "lora_B.weight"}


class LoRA(Method):
    """Adds `alpha / rank · B A` to each targeted matrix."""

    peft_type: ClassVar[str] = "LORA"

    rank: Annotated[int, Field(ge=1)] = 32
    """Rank r of the change."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """The change is scaled by alpha / rank, so the best learning rate hardly depends on the rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability with which an input of A is dropped in training."""
    targets: Targets = (ALL_LINEAR,)
    """Which matrices: `all-linear`, `attention`, names such as `q_proj`, or regular expressions over whole paths."""

    def sites(self, model: nn.Module) -> list[str]:
        return list(matrices(model, self.targets))

    def layer(self, base: nn.Module, path: str) -> "LoRALayer":
        return LoRALayer(base, self.rank, self.alpha / self.rank, self.dropout)

    def parameter_count(self, model: nn.Module) -> int:
        """rank · Σ (inputs + outputs) over the targeted matrices."""
        return self.rank * sum(inputs + outputs for inputs, outputs in matrices(model, self.targets).values())

    def learning_rate(self, at: Circumstances) -> tuple[float, str]:
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

    def to_peft(self, model: nn.Module, tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        everything, sites = modules(model), self.sites(model)
        config = {
            "peft_type": self.peft_type,
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "r": self.rank,
            "lora_alpha": int(self.alpha) if self.alpha.is_integer() else self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": shortest_names(sites, list(everything)),
            "fan_in_fan_out": not isinstance(everything[sites[0]], nn.Linear),
            "bias": "none",
            "use_rslora": False,
            "use_dora": False,
        }
        renamed = {}
        for key, tensor in tensors.items():
            path, _, name = key.rpartition(".")
            renamed[f"{PEFT_PREFIX}{path}.{PEFT_NAMES[name]}"] = tensor
        return config, renamed

    @classmethod
    def from_peft(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple["LoRA", dict[str, Tensor]]:
        only_known(
            config,
            honoured={"peft_type", "r", "lora_alpha", "lora_dropout", "target_modules"},
            neutral={
                "bias": ("none",),
                "task_type": ("CAUSAL_LM",),
                "init_lora_weights": (True,),  # decides where training began, not what the adapter computes
                "qalora_group_size": (16,),  # read with use_qalora alone
                "runtime_config": ({"ephemeral_gpu_offload": False},),
                "megatron_core": ("megatron.core",),  # read with megatron_config alone, and never by us
            },
            ignored={"auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version", "fan_in_fan_out"}
            # Which modules are adapted is read off the tensors.
            | {"exclude_modules", "layers_to_transform", "layers_pattern"},
        )
        renamed, paths, unknown = {}, [], []
        short = {theirs: ours for ours, theirs in PEFT_NAMES.items()}
        for key, tensor in tensors.items():
            path, name = next(((key.removesuffix(f".{n}"), n) for n in short if key.endswith(f".{n}")), (key, ""))
            if not name or not path.startswith(PEFT_PREFIX):
                unknown.append(key)
                continue
            path = path.removeprefix(PEFT_PREFIX)
            renamed[f"{path}.{short[name]}"] = tensor
            if path not in paths:
                paths.append(path)
        if unknown:
            raise ArtifactError(f"adapter_model.safetensors holds a tensor that is not LoRA's: {unknown[0]}.")
        if not paths:
            raise ArtifactError("adapter_model.safetensors holds no tensors.")
        # The tensors say exactly which modules are adapted; PEFT's patterns could match others of our base.
        targets = tuple(paths)
        method = cls.parse(
            {
                "rank": config.get("r", 8),
                "alpha": config.get("lora_alpha", 8),
                "dropout": config.get("lora_dropout", 0.0),
                "targets": targets,
            }
        )
        return method, renamed


class LoRALayer(AdapterLayer):
    """y = base(x) + scale · drop(x) Aᵀ Bᵀ. B starts at zero, so a new layer equals its base.

    Shapes: x (…, inputs), A (rank, inputs), B (outputs, rank). A and B are float32 even on a base of fewer bits.
    """

    def __init__(self, base: nn.Module, rank: int, scale: float, dropout: float) -> None:
        super().__init__(base)
        shape = matrix_shape(base)
        assert shape is not None, f"{type(base).__name__} is not a matrix"
        self.scale = scale
        self.dropout = nn.Dropout(dropout)
        kind = torch.promote_types(next(base.parameters()).dtype, torch.float32)
        self.A = nn.Parameter(torch.empty(rank, shape[0], dtype=kind))
        self.B = nn.Parameter(torch.zeros(shape[1], rank, dtype=kind))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))  # U(±1/√inputs), as in the authors' loralib

    def adapt(self, x: Tensor) -> Tensor:
        y = self.base(x)
        update = F.linear(self.dropout(x), self.A.to(x.dtype))
        expand = (self.scale * self.B).to(x.dtype).T
        return torch.addmm(y.flatten(0, -2), update.flatten(0, -2), expand).view_as(y)  # one pass over y, not three

    @torch.no_grad()
    def merged(self) -> nn.Module:
        merged = copy.deepcopy(self.base)
        weight = merged.weight
        assert isinstance(weight, Tensor)
        change = self.scale * self.B @ self.A  # (outputs, inputs), as nn.Linear stores its weight
        stored = weight.to(change.dtype) + (change if isinstance(merged, nn.Linear) else change.T)
        merged.weight = nn.Parameter(stored, requires_grad=False)
        return merged


def shortest_names(sites: list[str], all_paths: list[str]) -> list[str]:
    """Names by which PEFT, which matches ends of paths, finds exactly `sites`: last parts where they suffice, else whole paths."""
    wanted, names = set(sites), []
    for last in dict.fromkeys(path.rpartition(".")[2] for path in sites):
        matching = [path for path in all_paths if path == last or path.endswith(f".{last}")]
        names += [last] if wanted.issuperset(matching) else [path for path in sites if path.rpartition(".")[2] == last]
    return names
