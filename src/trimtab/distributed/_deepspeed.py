"""DeepSpeed, as far as engines use it: imported without its words, set up with what the recipe says, and an optimizer that it divides."""

import importlib.util
import io
import logging
import math
import os
import re
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import BeforeValidator, PlainSerializer
from torch import Tensor, nn

from trimtab.base import Base, ModelConfig
from trimtab.core import files
from trimtab.core.errors import NonFinite, RecipeError
from trimtab.core.processes import processes
from trimtab.distributed import Engine
from trimtab.distributed._deepspeed_config import read_config
from trimtab.methods import Attached, Method
from trimtab.objectives import Objective
from trimtab.train import Optimizer, TrainConfig, UpdateRule
from trimtab.train.optimizers import Trained

OLDEST = (0, 19, 8)
"""The first version that was tested. Those before 0.19 make means of gradients, and gather layers in another way."""
BUCKET = 50_000_000
"""Numbers that are exchanged at a time, unless the configuration says otherwise; DeepSpeed's own 500 million would be 2 GB of memory."""


def _path(raw: Any) -> Any:
    return files.expand_user(raw) if isinstance(raw, str | Path) and str(raw) else raw


ConfigPath = Annotated[Path, BeforeValidator(_path), PlainSerializer(str)]


class DeepSpeedEngine(Engine):
    """What DeepSpeed does, by the stage of ZeRO."""

    stage: ClassVar[int]
    divides: ClassVar[str]
    """What is divided, for a sentence."""

    config: ConfigPath | None = None
    """A DeepSpeed configuration, as JSON. What makes training faster is handed on; what would change its result is refused."""

    def absolute(self) -> Engine:
        if self.config is None or not self.config.exists():
            return self
        return self.model_copy(update={"config": self.config.absolute()})

    def check(self, model: ModelConfig, method: Method, objective: Objective, train: TrainConfig) -> None:
        self.told(train)
        if processes.size > 1 and (problem := _unusable()):
            raise RecipeError(
                f"distributed.engine: {self.name} needs DeepSpeed, {problem}. Install it (pip install 'trimtab[deepspeed]'), "
                f"or use {'fsdp' if self.shards_base else 'ddp'}, which needs nothing else."
            )

    def prepare(self, base: Base, adapter: Attached, model: ModelConfig) -> None:
        if processes.size > 1:
            base.notes += (
                f"DeepSpeed {version()}, ZeRO-{self.stage}: {self.divides} divided among {processes.size} processes",
            )

    def told(self, train: TrainConfig | None = None) -> dict[str, Any]:
        """What the configuration says that DeepSpeed is told. Raises RecipeError."""
        return read_config(self.config, self.stage, train) if self.config is not None else {}


class PartitioningEngine(DeepSpeedEngine):
    """The optimizer's state is divided among the processes; the base is whole on each, and passes are not DeepSpeed's."""

    def check(self, model: ModelConfig, method: Method, objective: Objective, train: TrainConfig) -> None:
        super().check(model, method, objective, train)
        if train.optimizer.name != "adamw":
            raise RecipeError(
                f"distributed.engine: {self.name} cannot divide what {train.optimizer.name} holds: DeepSpeed cuts parameters at any number, "
                "as AdamW's can be. Use train.optimizer=adamw, or distributed.engine=ddp."
            )

    def check_base(self, base: Base) -> None:
        dtype = next(p.dtype for p in base.model.parameters() if p.is_floating_point())
        if dtype in (torch.float16, torch.float64) and processes.size > 1:
            raise RecipeError(
                f"distributed.engine: {self.name} trains beside a base model in bfloat16 or float32, and this one is in "
                f"{str(dtype).removeprefix('torch.')}. Set model.dtype, or use distributed.engine=ddp."
            )

    def optimizer(self, adapter: Attached, train: TrainConfig) -> Optimizer:
        if processes.size == 1:
            return super().optimizer(adapter, train)
        return PartitionedOptimizer(adapter, train, self.stage, self.told(train))


class PartitionedOptimizer(Optimizer):
    """AdamW whose state DeepSpeed divides among the processes, and which it updates each a share of.

    DeepSpeed knows parameters of its own, in the memory of the adapter's: its hooks would otherwise take part in every backward pass. The
    gradients of a step are handed to it at once, and it adds those of all processes.
    """

    def __init__(self, adapter: Attached, train: TrainConfig, stage: int, told: Mapping[str, Any]) -> None:
        self._stage, self._told, self._clip = stage, told, train.clip
        super().__init__(adapter, train.weight_decay, train.optimizer)
        self._check_sum()

    def _build(self, rule: UpdateRule, trained: list[Trained], weight_decay: float) -> list[torch.optim.Optimizer]:
        self._shadows = [nn.Parameter(one.parameter.detach()) for one in trained]
        parts = rule.build(
            [one._replace(parameter=shadow) for one, shadow in zip(trained, self._shadows, strict=True)], weight_decay
        )
        size = sum(shadow.numel() for shadow in self._shadows)
        zero = {"overlap_comm": False, **self._told, "stage": self._stage}
        for bucket in ("reduce_bucket_size", "allgather_bucket_size"):
            zero[bucket] = max(1, min(self._told.get(bucket, BUCKET), size))
        self._engine = initialize(nn.ParameterList(self._shadows), zero, parts[0], self._clip)
        self._share_values()
        return parts

    def _share_values(self) -> None:
        for parameter, shadow in zip(self.parameters, self._shadows, strict=True):
            parameter.data = shadow.data

    def _check_sum(self) -> None:
        """Raise RecipeError unless this version of DeepSpeed adds gradients; a mean, or a wrong place, would be learned from in silence."""
        for joined in self._gradients:
            joined.fill_(processes.rank + 1.0)
        self.sum_gradients()
        found = float(self.clip(self._clip))
        expected = math.sqrt(sum(map(len, self._gradients))) * processes.size * (processes.size + 1) / 2
        self.clear()
        if not math.isclose(found, expected, rel_tol=1e-4):
            raise RecipeError(
                f"DeepSpeed {version()} makes gradients of norm {found:g} of some whose sum has {expected:g}. Install 0.19.8, which is tested "
                "(pip install 'trimtab[deepspeed]'), or use distributed.engine=ddp."
            )

    def sum_gradients(self) -> None:
        started = time.perf_counter()
        self._engine.backward(_HandedOver.apply([parameter.grad for parameter in self.parameters], *self._shadows))
        processes.waited += time.perf_counter() - started

    def clip(self, most: float | None) -> Tensor:
        """The norm of the gradients; DeepSpeed scales them in its step."""
        assert most == self._clip
        return torch.as_tensor(self._engine.optimizer.scaled_global_norm())

    def _update(self, lr: float) -> None:
        zero = self._engine.optimizer
        if all(gradients is None for gradients in zero.averaged_gradients.values()):
            self.sum_gradients()
        for group in self._parts[0].param_groups:
            group["lr"] = lr * group["lr_multiplier"]
        self._engine.step()
        if zero.overflow:
            raise NonFinite("DeepSpeed left out a step whose gradients had a finite norm.")
        self._share_values()

    def clear(self) -> None:
        for joined in self._gradients:
            joined.zero_()
        zero = self._engine.optimizer
        zero.zero_grad(set_to_none=True)
        zero.averaged_gradients.update(dict.fromkeys(zero.averaged_gradients))

    def release(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None
        self._gradients = []

    def _held(self) -> dict[str, Tensor]:
        """Whole, which takes exchanges: all processes ask for it together."""
        from deepspeed.utils import safe_get_full_optimizer_state

        state: dict[str, Any] = next(iter(self._states()), {})
        kinds = [kind for kind, value in state.items() if kind not in self._constants and isinstance(value, Tensor)]
        return {
            f"{kind}/{name}": safe_get_full_optimizer_state(shadow, kind)
            for name, shadow in zip(self.named, self._shadows, strict=True)
            for kind in kinds
        }

    def _hold(self, held: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        self._engine.optimizer.refresh_fp32_params()
        shadows = dict(zip(self.named, self._shadows, strict=True))
        for name in held:
            kind, _, parameter = name.partition("/")
            safe_set_full_optimizer_state(shadows[parameter], tensors[name].to(shadows[parameter].device), kind)

    def _states(self) -> Iterable[dict[str, Any]]:
        return self._parts[0].state.values()

    def _forget(self) -> None:
        super()._forget()
        self._engine.optimizer._hp_optimizer_states_linked = False


class _HandedOver(torch.autograd.Function):
    """Zero, whose backward pass gives parameters these gradients."""

    @staticmethod
    def forward(ctx: Any, gradients: Sequence[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.gradients


def version() -> str:
    return metadata.version("deepspeed")


def _unusable() -> str | None:
    """Why the package can't be used; None if it can."""
    if importlib.util.find_spec("deepspeed") is None:
        return "which is not installed"
    numbers = tuple(map(int, re.findall(r"\d+", version())[:3]))
    return f"and {version()} is too old: {'.'.join(map(str, OLDEST))} is needed" if numbers < OLDEST else None


def initialize(module: nn.Module, zero: Mapping[str, Any], optimizer: Any, clip: float | None = None) -> Any:
    """DeepSpeed's engine around a module.

    Args:
        zero: The section `zero_optimization` of its configuration.
        optimizer: torch's; None for no updates by DeepSpeed.
    """
    device = next(module.parameters()).device
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip or 0.0,
        "steps_per_print": 1_000_000_000,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": dict(zero),
        **({"gradient_allreduce_op": "sum"} if optimizer is not None else {}),
    }
    deepspeed = imported(device)
    with _quiet():
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)
    return engine


def imported(device: torch.device) -> Any:
    """The package, which has been told not to speak, and of the processes."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    with _quiet():
        import deepspeed

        logger = logging.getLogger("DeepSpeed")  # its handlers write to the standard output that they found when they were made
        logger.handlers, logger.propagate = [logging.NullHandler()], False
        # On a CPU it would compile an extension when it starts: minutes, or for ever beside the lock of one that was killed.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        backend = "nccl" if device.type == "cuda" else "gloo"
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\..* is deprecated", category=FutureWarning)
    return deepspeed


@contextmanager
def _quiet() -> Iterator[None]:
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield
