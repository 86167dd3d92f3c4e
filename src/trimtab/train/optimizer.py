"""The optimizer of an adapter's parameters: uninterrupted steps, and its state by the parameters' names."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.artifacts import sha256_tensor
from trimtab.core.errors import ArtifactError
from trimtab.core.interrupts import interrupts_deferred
from trimtab.core.processes import processes
from trimtab.methods import Attached, matrix_shape, unwrap
from trimtab.train.loss_scale import LossScale
from trimtab.train.optimizers import Trained, UpdateRule
from trimtab.train.optimizers.adamw import AdamW

STEP = "step"
"""The libraries' name of a parameter's number of steps, which is the same for all."""


class Optimizer:
    """The optimizers that a rule makes for an adapter's parameters, as one."""

    def __init__(self, adapter: Attached, weight_decay: float, rule: UpdateRule | None = None) -> None:
        """`rule` is AdamW unless given. Raises RecipeError if it does not suit these parameters."""
        self.adapter = adapter
        self.named = adapter.parameters()
        self.taken = 0
        """Steps, skipped ones included."""
        self.skipped = 0
        self.loss_scale = LossScale.of(adapter.model)
        """Of the gradients that `step` takes; of the next step's, afterwards."""
        rule = rule or AdamW()
        self._constants = {STEP, *rule.constants}
        trained = trained_by(adapter)
        rule.check_suits(trained)
        self._parts = self._build(rule, trained, weight_decay)
        # If they were made later, among the temporary tensors of a backward pass, gradients would fragment memory.
        self._gradients = self._make_gradients()

    def _build(self, rule: UpdateRule, trained: list[Trained], weight_decay: float) -> list[torch.optim.Optimizer]:
        return rule.build(trained, weight_decay)

    def _make_gradients(self) -> list[Tensor]:
        """Gradients of zero for the parameters; the few tensors that they are views of."""
        return joined_gradients(self.parameters)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.named.values())

    def sum_gradients(self) -> None:
        """Add the gradients of all processes, which are the same everywhere afterwards."""
        for joined in self._gradients:
            processes.sum_(joined)

    def step(self, lr: float) -> None:
        """Update the parameters by their gradients, and clear those. An interrupt meanwhile is raised afterwards."""
        with interrupts_deferred():
            self._update(lr)
            self.clear()
            self.taken += 1
            self.loss_scale = self.loss_scale.after_step()
            self.adapter.trained = True

    def _update(self, lr: float) -> None:
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = lr * group["lr_multiplier"]
            part.step()

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
        for part in self._parts:
            part.zero_grad(set_to_none=False)

    def release(self) -> None:
        """Free the gradients' memory."""
        for part in self._parts:
            part.zero_grad(set_to_none=True)
        self._gradients = []

    def state(self) -> dict[str, Tensor]:
        """All that further steps depend on, on the CPU: values, and what the optimizer holds, by kind and name; not copied if there already."""
        values = {f"value/{name}": parameter.detach() for name, parameter in self.named.items()}
        return {name: tensor.to("cpu").contiguous() for name, tensor in (values | self._held()).items()}

    def whole_in(self, state: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Within the block, the adapter's parameters are the values in this state, to be saved: they are already, where they are whole."""
        return nullcontext()

    def _held(self) -> dict[str, Tensor]:
        """What the optimizer holds beside the number of steps, by the library's name of it and the parameter's; nothing before a step."""
        return {
            f"{kind}/{name}": value
            for name, parameter in self.named.items()
            for kind, value in self._state_of(parameter).items()
            if kind not in self._constants and isinstance(value, Tensor)
        }

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        return next((part.state[parameter] for part in self._parts if parameter in part.state), {})

    def load(self, tensors: Mapping[str, Tensor], taken: int, skipped: int = 0, scale: LossScale | None = None) -> None:
        """Resume from a state. Raises ArtifactError, changing nothing, if names, shapes or types are not this optimizer's."""
        fresh = not self._held()
        if fresh and taken > skipped:  # so that the library makes what it holds, where it wants it
            self.clear()
            self._update(0.0)
        try:
            self._load(tensors, taken - skipped)
        except ArtifactError:
            if fresh:
                self._forget()
            raise
        self.taken, self.skipped = taken, skipped
        self.loss_scale = replace(scale) if scale is not None else self.loss_scale

    def _load(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        held = self._held() if steps else {}
        expected = {f"value/{name}": parameter.detach() for name, parameter in self.named.items()} | held
        wrong = sorted(tensors.keys() ^ expected.keys())
        wrong += [n for n in tensors.keys() & expected.keys() if _form(tensors[n]) != _form(expected[n])]
        if wrong:
            raise ArtifactError(
                f"{wrong[0]} is not what this run trains{f' (and {len(wrong) - 1} more)' if wrong[1:] else ''}."
            )
        self._take_values({name: tensors[f"value/{name}"] for name in self.named})
        self._hold(held, tensors)
        if not steps:
            self._forget()
        for state in self._states():
            if isinstance(count := state.get(STEP), Tensor):
                count.fill_(steps)
            elif count is not None:
                state[STEP] = steps

    def _take_values(self, values: Mapping[str, Tensor]) -> None:
        """Give the parameters these values. Raises ArtifactError, changing nothing, if one is not finite."""
        self.adapter.load_state(values)

    def _hold(self, held: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        """Have these values in the place of those that are held."""
        for name, tensor in held.items():
            tensor.copy_(tensors[name])

    def _states(self) -> Iterable[dict[str, Any]]:
        """What the library holds, of each of its parameters."""
        return map(self._state_of, self.parameters)

    def _forget(self) -> None:
        for part in self._parts:
            part.state.clear()


def trained_by(adapter: Attached) -> list[Trained]:
    """The adapter's parameters as an optimizer sees them."""
    model: Any = adapter.model
    head = unwrap(model.get_output_embeddings())
    of_matrix = {
        id(parameter)
        for layer in adapter.layers.values()
        if (base := unwrap(layer.base)) is not head and matrix_shape(base) is not None
        for parameter in layer.own_parameters().values()
        if parameter.ndim == 2
    }
    multiplier = adapter.method.lr_multiplier
    return [Trained(p, multiplier(name.rpartition(".")[2]), id(p) in of_matrix) for name, p in adapter.parameters().items()]


def joined_gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Gradients of zero for the parameters, as views of one tensor for each dtype, so that processes add them all at once."""
    by_dtype: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for parameter in parameters:
        by_dtype.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    joined = []
    for (dtype, device), those in by_dtype.items():
        sizes = [parameter.numel() for parameter in those]
        joined.append(torch.zeros(sum(sizes), dtype=dtype, device=device))
        for parameter, part in zip(those, joined[-1].split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)
    return joined


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype
