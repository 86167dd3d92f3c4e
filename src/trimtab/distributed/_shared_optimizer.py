"""The optimizer of full fine-tuning in shares: every process updates a part of each trained weight, and holds the state of that part alone.

What is trained outside of layers, and vectors, are whole on every process, as are their gradients, which are added once a step; of these
numbers, each process updates a stretch, which all the others get.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trimtab.artifacts import sha256_tensor
from trimtab.core import files
from trimtab.core.errors import ArtifactError, RecipeError
from trimtab.core.processes import processes
from trimtab.core.wrapping import is_divided, trunk_of, unwrap
from trimtab.distributed._shares import outermost
from trimtab.engine.patching import layers_of
from trimtab.methods import Attached
from trimtab.train import Optimizer, TrainConfig, UpdateRule
from trimtab.train.optimizer import joined_gradients
from trimtab.train.optimizers import Trained

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class _Rows:
    """This process's rows of a weight that FSDP divides."""

    def __init__(self, name: str, trained: Trained) -> None:
        weight: Any = trained.parameter
        self.weights, self.weight, self.mesh = {name: weight}, weight, weight.device_mesh
        self.part = nn.Parameter(weight.detach().to_local())
        self.trained = trained._replace(parameter=self.part)

    def make_gradient(self, own: Tensor) -> None:
        """Have FSDP add to this gradient of the part."""
        self.weight.grad = self._placed(own)

    def whole(self, part: Tensor) -> dict[str, Tensor]:
        """Of what each process has a part of, the whole by name; all ask for it together."""
        return {name: self._placed(part).full_tensor() for name in self.weights}

    def part_of(self, wholes: Mapping[str, Tensor]) -> Tensor:
        (name,) = self.weights
        rows, place = wholes[name].chunk(self.mesh.size()), self.mesh.get_local_rank()
        return rows[place] if place < len(rows) else wholes[name][:0]

    def _placed(self, part: Tensor) -> Any:
        from torch.distributed.tensor import DTensor, Shard

        shape, stride = self.weight.shape, self.weight.stride()
        return DTensor.from_local(part.detach(), self.mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


class _Stretch:
    """This process's stretch of all numbers of weights that are whole on every process, side by side."""

    def __init__(self, weights: Mapping[str, nn.Parameter], like: Trained, mesh: Any) -> None:
        self.weights, self.mesh = weights, mesh
        self.values = self._joined(weights)
        for weight, view in zip(weights.values(), self._views(self.values), strict=True):
            weight.data = view
        self.part = nn.Parameter(self._own(self.values))
        self.trained = like._replace(parameter=self.part)

    def make_gradient(self) -> Tensor:
        """Gradients of zero for the weights; one tensor, of which they are views."""
        gradients = torch.zeros_like(self.values)
        for weight, view in zip(self.weights.values(), self._views(gradients), strict=True):
            weight.grad = view
        self.part.grad = self._own(gradients)
        return gradients

    def send(self) -> None:
        """Have all the values of each process's stretch."""
        torch.distributed.all_gather_into_tensor(self.values, self.part.detach(), self.mesh.get_group())

    def whole(self, part: Tensor) -> dict[str, Tensor]:
        joined = torch.empty_like(self.values)
        torch.distributed.all_gather_into_tensor(joined, part, self.mesh.get_group())
        return dict(zip(self.weights, self._views(joined), strict=True))

    def part_of(self, wholes: Mapping[str, Tensor]) -> Tensor:
        return self._own(self._joined({name: wholes[name] for name in self.weights}))

    def _joined(self, tensors: Mapping[str, Tensor]) -> Tensor:
        flat = [tensor.detach().flatten() for tensor in tensors.values()]
        rest = -sum(map(len, flat)) % self.mesh.size()
        return torch.cat([*flat, flat[0].new_zeros(rest)])

    def _views(self, joined: Tensor) -> list[Tensor]:
        sizes = [weight.numel() for weight in self.weights.values()]
        parts = joined[: sum(sizes)].split(sizes)
        return [part.view(weight.shape) for part, weight in zip(parts, self.weights.values(), strict=True)]

    def _own(self, joined: Tensor) -> Tensor:
        return joined.chunk(self.mesh.size())[self.mesh.get_local_rank()]


class SharedOptimizer(Optimizer):
    """The optimizer of trained weights of which every process updates a part, for rules that treat each number by itself."""

    def __init__(self, adapter: Attached, train: TrainConfig) -> None:
        weights: dict[str, Any] = {**adapter.parameters()}
        self._mesh: Any = next(p.device_mesh for p in weights.values() if is_divided(p))
        self._machines = processes.size // self._mesh.size()
        self._across = _same_places(self._mesh) if self._machines > 1 else None
        super().__init__(adapter, train.weight_decay, train.optimizer)
        self._check_sum()

    def _build(self, rule: UpdateRule, trained: list[Trained], weight_decay: float) -> list[torch.optim.Optimizer]:
        by_name = dict(zip(self.named, trained, strict=True))
        alike: dict[Any, dict[str, Trained]] = {}
        for name, one in by_name.items():
            if not is_divided(one.parameter):
                alike.setdefault((one.parameter.dtype, one.lr_multiplier, one.is_matrix), {})[name] = one
        self._rows = [_Rows(name, one) for name, one in by_name.items() if is_divided(one.parameter)]
        self._stretches = [
            _Stretch({name: one.parameter for name, one in those.items()}, next(iter(those.values())), self._mesh)
            for those in alike.values()
        ]
        return rule.build([share.trained for share in self._shares], weight_decay)

    @property
    def _shares(self) -> "list[_Rows | _Stretch]":
        return [*self._rows, *self._stretches]

    def _make_gradients(self) -> list[Tensor]:
        self._of_rows = joined_gradients([share.part for share in self._rows])
        for share in self._rows:
            assert share.part.grad is not None
            share.make_gradient(share.part.grad)
        self._of_wholes = [share.make_gradient() for share in self._stretches]
        return [*self._of_rows, *self._of_wholes]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parts of this process."""
        return [share.part for share in self._shares]

    def sum_gradients(self) -> None:
        """Add up what FSDP has not: gradients of what is whole, and those of other machines."""
        for joined in self._of_wholes:
            processes.sum_(joined)
        for joined in self._of_rows if self._across is not None else ():
            processes.sum_(joined, self._across)

    def clip(self, most: float | None) -> Tensor:
        square = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None]) ** 2 / self._machines
        processes.sum_(square)
        norm = square.sqrt()
        if most is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, most, norm)
        return norm

    def _check_sum(self) -> None:
        """Raise RecipeError unless gradients are added up, those of two passes, too: a mean would be learned from in silence.

        Passes are through the sums of each layer's weights, so every gradient is this process's number.
        """
        layers, trunk = outermost(layers_of(self.adapter.model)), unwrap(trunk_of(self.adapter.model))
        numbers = [1.0 + rank % 2 for rank in range(processes.size)]
        own = numbers[processes.rank]

        def summed(layer: nn.Module, x: Tensor) -> Tensor:
            return x + own * sum((p.sum() for p in layer.parameters() if p.requires_grad), start=x.new_zeros(()))

        def through(x: Tensor) -> Tensor:
            for layer in layers:
                x = layer(x)
            return x

        with _computing({trunk: through, **{layer: partial(summed, layer) for layer in layers}}):
            for _ in range(2):
                trunk(torch.zeros(1, device=self._mesh.device_type, requires_grad=True)).sum().backward()
        for joined in self._of_wholes:
            joined.fill_(2 * own)
        self.sum_gradients()
        gradients = {next(iter(share.weights)): share.part.grad for share in self._shares}
        wrong = [name for name, found in gradients.items() if found is None or bool((found != 2 * sum(numbers)).any())]
        self.clear()
        if told := [name for names in processes.tell(wrong[:1]) for name in names]:
            raise RecipeError(
                f"PyTorch {torch.__version__} does not add up the gradients of {told[0]}, as it was asked to. Install 2.13, which is "
                "tested, or use distributed.engine=zero2."
            )

    def _update(self, lr: float) -> None:
        super()._update(lr)
        for share in self._stretches:
            share.send()

    def clear(self) -> None:
        for joined in self._gradients:
            joined.zero_()

    def release(self) -> None:
        for share in self._shares:
            for weight in (share.part, *share.weights.values()):
                weight.grad = None
        self._gradients = self._of_rows = self._of_wholes = []

    def not_finite(self) -> list[str]:
        finite = torch.stack([part.isfinite().all() for part in self.parameters]).tolist()
        own = [name for share, is_finite in zip(self._shares, finite, strict=True) if not is_finite for name in share.weights]
        told = processes.tell(own)
        return [name for name in self.named if any(name in names for names in told)]

    def digests(self) -> dict[str, str]:
        """Of what is whole, a hash of its values; of what is divided, one of the hashes of all shares on this machine.

        Processes that compare them find that wholes are the same everywhere, and that each machine's shares are those of the others.
        """
        # Of copies of shares: NumPy, which hashing uses, would hold on to their memory, which `Base.release` gives back.
        told = processes.tell([sha256_tensor(share.part.clone()) for share in self._rows])
        here = [told[rank] for rank in torch.distributed.get_process_group_ranks(self._mesh.get_group())]
        names = (name for share in self._rows for name in share.weights)
        of_rows = {name: files.json_digest(of_all) for name, *of_all in zip(names, *here, strict=True)}
        return {name: of_rows[name] if name in of_rows else sha256_tensor(weight) for name, weight in self.named.items()}

    def state(self) -> dict[str, Tensor]:
        """Whole, in the first process alone, which writes it; all put it together, one tensor after the other."""
        found = {}
        for kind, share, part in [*(("value", share, share.part.detach()) for share in self._shares), *self._moments()]:
            for name, whole in share.whole(part).items():
                if processes.first:
                    found[f"{kind}/{name}"] = whole.to("cpu").contiguous()
        return found

    @contextmanager
    def whole_in(self, state: Mapping[str, Tensor]) -> Iterator[None]:
        before = {layer: layer._parameters for layer in self.adapter.layers.values()}
        wholes = {id(p): nn.Parameter(state[f"value/{name}"], requires_grad=False) for name, p in self.named.items()}
        try:
            for layer, own in before.items():
                layer._parameters = {name: wholes[id(parameter)] for name, parameter in own.items()}
            yield
        finally:
            for layer, own in before.items():
                layer._parameters = own

    def _moments(self) -> "Iterator[tuple[str, _Rows | _Stretch, Tensor]]":
        """What the library holds of each share, by its name of it."""
        for share in self._shares:
            for kind, part in self._state_of(share.part).items():
                if kind not in self._constants and isinstance(part, Tensor):
                    yield kind, share, part

    def _held(self) -> dict[str, Tensor]:
        """The forms of the wholes alone."""
        return {
            f"{kind}/{name}": torch.empty(weight.shape, dtype=part.dtype, device="meta")
            for kind, share, part in self._moments()
            for name, weight in share.weights.items()
        }

    def _hold(self, held: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        for kind, share, part in self._moments():
            part.copy_(share.part_of({name: tensors[f"{kind}/{name}"] for name in share.weights}))

    @torch.no_grad()
    def _take_values(self, values: Mapping[str, Tensor]) -> None:
        if broken := [name for name, value in values.items() if not bool(value.isfinite().all())]:
            raise ArtifactError(f"{broken[0]} holds values that are not finite.")
        for share in self._shares:
            share.part.copy_(share.part_of(values))
        for share in self._stretches:
            share.send()
        self.adapter.trained = True


def _same_places(mesh: Any) -> "ProcessGroup":
    """The processes of all machines that hold the same shares as this one."""
    from torch.distributed import new_group

    here = mesh.size()
    groups = [new_group(list(range(place, processes.size, here))) for place in range(here)]
    return groups[mesh.get_local_rank()]


@contextmanager
def _computing(forward: Mapping[nn.Module, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Within the block, modules compute these functions, with all the hooks on them."""
    before = {module: vars(module).get("forward") for module in forward}
    try:
        for module, function in forward.items():
            module.forward = function
        yield
    finally:
        for module, own in before.items():
            del module.forward
            if own is not None:
                module.forward = own
