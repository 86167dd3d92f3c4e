"""AdamW on an adapter's parameters: uninterrupted steps, and optimizer state by the parameters' names."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.artifacts import sha256_tensor
from trimtab.core.errors import ArtifactError
from trimtab.core.interrupts import interrupts_deferred
from trimtab.methods import Attached
from trimtab.train.loss_scale import LossScale

MOMENTS = {"mean": "exp_avg", "square": "exp_avg_sq"}
"""Ours and torch's names."""


class Optimizer:
    """AdamW, with a parameter group for each learning rate multiplier of the method."""

    def __init__(self, adapter: Attached, weight_decay: float) -> None:
        self.adapter = adapter
        self.named = adapter.parameters()
        self.taken = 0
        """Steps, skipped ones included."""
        self.skipped = 0
        self.loss_scale = LossScale.of(adapter.model)
        """Of the gradients that `step` takes; of the next step's, afterwards."""
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self.named.items():
            groups.setdefault(adapter.method.lr_multiplier(name.rpartition(".")[2]), []).append(parameter)
            # If they were made later, among the temporary tensors of a backward pass, gradients would fragment memory.
            parameter.grad = torch.zeros_like(parameter)
        by_rate = [{"params": group, "lr_multiplier": multiplier} for multiplier, group in groups.items()]
        self.fused = _has_fused_adamw(next(iter(self.named.values())).device)
        fused, foreach = self.fused, not self.fused
        self._adamw = torch.optim.AdamW(by_rate, lr=0.0, weight_decay=weight_decay, fused=fused, foreach=foreach)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.named.values())

    def step(self, lr: float) -> None:
        """Update the parameters by their gradients, and clear those. An interrupt meanwhile is raised afterwards."""
        for group in self._adamw.param_groups:
            group["lr"] = lr * group["lr_multiplier"]
        with interrupts_deferred():
            self._adamw.step()
            self.clear()
            self.taken += 1
            self.loss_scale = self.loss_scale.after_step()
            self.adapter.trained = True

    def skip(self) -> None:
        """Skip a step: clear its gradients, and change nothing else."""
        self.clear()
        self.taken += 1
        self.skipped += 1

    def clip(self, most: float | None) -> Tensor:
        """The norm of the gradients, which are scaled so that it is at most this; nothing is read from the device."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if most is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, most, norm)
        return norm

    def not_finite(self) -> list[str]:
        """The names of parameters with a NaN or Inf."""
        finite = torch.stack([parameter.isfinite().all() for parameter in self.named.values()]).tolist()  # by one read
        return [name for name, is_finite in zip(self.named, finite, strict=True) if not is_finite]

    def digests(self) -> dict[str, str]:
        """A hash of each parameter's values, by its name."""
        return {name: sha256_tensor(parameter) for name, parameter in self.named.items()}

    def clear(self) -> None:
        """Set the gradients to zero."""
        self._adamw.zero_grad(set_to_none=False)

    def release(self) -> None:
        """Free the gradients' memory."""
        self._adamw.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """All that further steps depend on: values and both moments, by kind and name, on the CPU; not copied if there already."""
        held = {f"value/{name}": parameter.detach() for name, parameter in self.named.items()}
        for name, parameter in self.named.items():
            for ours, theirs in MOMENTS.items():
                moment = self._adamw.state[parameter].get(theirs) if parameter in self._adamw.state else None
                held[f"{ours}/{name}"] = torch.zeros_like(parameter) if moment is None else moment
        return {name: tensor.to("cpu").contiguous() for name, tensor in held.items()}

    def load(self, tensors: Mapping[str, Tensor], taken: int, skipped: int = 0, scale: LossScale | None = None) -> None:
        """Resume from a state. Raises ArtifactError, changing nothing, if the names, shapes or types are not these parameters'."""
        expected = {f"{kind}/{name}": p for kind in ("value", *MOMENTS) for name, p in self.named.items()}
        wrong = sorted(tensors.keys() ^ expected.keys())
        wrong += [n for n in tensors.keys() & expected.keys() if _form(tensors[n]) != _form(expected[n])]
        if wrong:
            raise ArtifactError(
                f"{wrong[0]} is not what this run trains{f' (and {len(wrong) - 1} more)' if wrong[1:] else ''}."
            )
        self.adapter.load_state({name: tensors[f"value/{name}"] for name in self.named})
        for name, parameter in self.named.items():
            state: dict[str, Any] = {
                theirs: tensors[f"{ours}/{name}"].to(parameter.device, copy=True) for ours, theirs in MOMENTS.items()
            }
            at = parameter.device if self.fused else torch.device("cpu")  # else each step would wait for the device to read it
            self._adamw.state[parameter] = {"step": torch.tensor(float(taken - skipped), device=at), **state}
        self.taken, self.skipped = taken, skipped
        self.loss_scale = replace(scale) if scale is not None else self.loss_scale


def _has_fused_adamw(device: torch.device) -> bool:
    """Whether torch has one kernel for AdamW's step on the device; else it takes one for each operation, of all tensors at once."""
    try:
        torch.optim.AdamW([torch.zeros(1, device=device, requires_grad=True)], fused=True)
    except RuntimeError:
        return False
    return True


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype
