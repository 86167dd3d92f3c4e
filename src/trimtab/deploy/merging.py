"""Merging an adapter into its base model: a plain Transformers folder, checked by loading it and comparing logits."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.base import Base, write_config, write_processor, write_switches, write_tokenizer
from trimtab.core import files
from trimtab.core.attention import without_cudnn
from trimtab.core.errors import ArtifactError, NotMergeable
from trimtab.core.wrapping import own_modules_in_place
from trimtab.methods import Attached, base_modules, unwrap

COPIES = 2
"""How many copies of the base model in float32 a merge holds beside it: the sum, and what was saved, loaded again."""
MIN_RETAINED = 0.99
"""The share of the adapter's change below which a merge gets a warning."""


class MergeReport(NamedTuple):
    """The accuracy of a merge, measured on the saved folder as Transformers loads it."""

    matrices: int
    max_logit_difference: float
    """Largest difference from the logits of the adapter on its base model."""
    logit_scale: float
    """Largest absolute logit, for comparison."""
    same_top_token: float
    """Share of positions with the same most likely token."""
    retained: float
    """Share of the adapter's change left after base model and sum are rounded to the dtype: 1 − ‖lost‖ / ‖change‖."""


@torch.no_grad()
def merge(
    base: Base,
    adapter: Attached,
    folder: Path | str,
    prompts: list[list[int]] | None = None,
    dtype: torch.dtype = torch.float32,
) -> MergeReport:
    """Write base model and adapter as one plain model. The base model in memory is left unchanged.

    Args:
        folder: A new folder, written only if the model in it reproduces the adapter's logits.
        prompts: Tokens on which the logits are compared; random by default.
        dtype: Of the weights written. The sum is computed in float32 and rounded once.

    Raises:
        NotMergeable: The method is not a change of weights, the base model is quantized, or a weight overflows the dtype.
        ArtifactError: The adapter holds NaN or Inf, or the saved model gives different logits.
        StorageError: The folder exists, or can't be written.
    """
    _check_mergeable(base, adapter)
    with files.new_folder(Path(folder)) as new:
        weights = _merged_weights(base, adapter)
        changes = _config_changes(base, weights) | {"dtype": str(dtype).removeprefix("torch.")}
        retained = _retained(base, weights, dtype)
        exact = {} if dtype == torch.float32 else dict(weights)
        rounded = _rounded(weights, dtype)
        with own_modules_in_place(base.model):
            type(base.model).save_pretrained(base.model, new, state_dict=rounded)  # which empties it
        write_config(base.model, new, changes)
        _write_stop_tokens(new, base)
        write_processor(base.model, new, own_template=base.chat_template is None)
        if base.tokenizer is not None:
            write_tokenizer(base.tokenizer, new, changed=bool(base.added_tokens) or base.chat_template is not None)
            write_switches(new, base.template_switches)
        differences = _check_saved(base, new, prompts, exact, dtype)
    return MergeReport(len(adapter.layers), *differences, retained)


def _check_mergeable(base: Base, adapter: Attached) -> None:
    """Raise NotMergeable or ArtifactError for an adapter that can't be merged."""
    if not adapter.method.mergeable:
        raise NotMergeable(
            f"{adapter.method.name} is not a change of weights, so it cannot be merged into the base model. Use the adapter beside its "
            "base model instead."
        )
    if base.quantization != "none":
        raise NotMergeable(
            f"{base.source} is quantized ({base.quantization}): its sum with an adapter would have to be quantized again, which loses "
            "much of the adapter, and the adapter was not trained on an unquantized base model. Use the adapter beside its base model; or "
            "train in float32 or bfloat16, and merge that."
        )
    if foreign := base.added_tokens.keys() - set(adapter.method.new_tokens):
        raise NotMergeable(
            f"Another adapter has added {min(foreign)!r} to the tokenizer. To merge this adapter, load it on a base model of its own."
        )
    broken = [name for name, p in adapter.parameters().items() if not bool(p.isfinite().all())]
    if broken:
        raise ArtifactError(f"The adapter's {broken[0]} holds NaN or Inf, so nothing was merged.")


def _rounded(weights: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The same weights in a dtype, tied ones still tied. Raises NotMergeable if one overflows it."""
    rounded: dict[int, Tensor] = {}
    for name, tensor in weights.items():
        new = rounded.setdefault(id(tensor), tensor.to(dtype) if tensor.is_floating_point() else tensor)
        if tensor.is_floating_point() and not bool(new.isfinite().all()):
            raise NotMergeable(
                f"{name} holds {float(tensor.abs().max()):.3g}, which overflows {dtype}: merge in bfloat16 or float32."
            )
    return {name: rounded[id(tensor)] for name, tensor in weights.items()}


def _retained(base: Base, weights: dict[str, Tensor], dtype: torch.dtype) -> float:
    """1 − ‖(R(W + D) − R(W)) − D‖ / ‖D‖ over all weights W and the adapter's changes D, where R rounds; at least 0."""
    change = lost = 0.0
    for path, module in base_modules(base.model).items():
        for name, tensor in _own_tensors(module):
            new = weights[f"{path}.{name}" if path else name]
            if new.is_floating_point() and dtype != torch.float32:
                old = F.pad(tensor.detach().float(), (0, 0) * (new.ndim - 1) + (0, len(new) - len(tensor)))  # new tokens' rows
                if not torch.equal(new, old):
                    change += float((new - old).double().square().sum())
                    lost += float((new.to(dtype).float() - old.to(dtype).float() - (new - old)).double().square().sum())
    return 1.0 - min(1.0, math.sqrt(lost / change)) if change else 1.0


def _merged_weights(base: Base, adapter: Attached) -> dict[str, Tensor]:
    """The merged model's tensors in float32 by their names without adapters, tied ones still tied."""
    merged: dict[str, Tensor] = {}
    tied: dict[int, Tensor] = {}
    for path, layer in adapter.layers.items():
        for name, tensor in layer.merge().state_dict(keep_vars=True).items():
            new = tensor.detach().float()
            first = tied.setdefault(id(getattr(unwrap(layer), name, new)), new)
            merged[f"{path}.{name}"] = first if torch.equal(first, new) else new
    converted: dict[int, Tensor] = {}
    weights = {}
    for path, module in base_modules(base.model).items():
        for name, tensor in _own_tensors(module):
            original = converted.setdefault(
                id(tensor), tensor.detach().float() if tensor.is_floating_point() else tensor.detach()
            )
            key = f"{path}.{name}" if path else name
            weights[key] = merged.get(key, original)
    return weights


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own parameters and persistent buffers, without those of its submodules."""
    yield from module.named_parameters(recurse=False)
    yield from ((n, t) for n, t in module.named_buffers(recurse=False) if n not in module._non_persistent_buffers_set)


def _config_changes(base: Base, weights: dict[str, Tensor]) -> dict[str, Any]:
    """Changes to the configuration: the vocabulary size, and untied embeddings if head and embeddings differ."""
    ends = [unwrap(end) for end in (base.model.get_input_embeddings(), base.model.get_output_embeddings())]
    paths = {id(module): path for path, module in base_modules(base.model).items()}
    embeddings, head = (weights[f"{paths[id(end)]}.weight"] for end in ends)
    return {"vocab_size": len(embeddings)} | ({"tie_word_embeddings": False} if embeddings is not head else {})


def _write_stop_tokens(folder: Path, base: Base) -> None:
    """Write the tokens that the model was trained to stop at into its generation config."""
    path = folder / "generation_config.json"
    settings: dict[str, Any] = files.read_json(path) if path.exists() else {}
    if base.tokenizer is not None:
        settings["eos_token_id"] = list(base.stop_ids) if len(base.stop_ids) > 1 else base.stop_ids[0]
    files.write_json(path, settings)


def _check_saved(
    base: Base, folder: Path, prompts: list[list[int]] | None, exact: dict[str, Tensor], dtype: torch.dtype
) -> tuple[float, float, float]:
    """The largest difference of logits, the largest logit, and the share of equal most likely tokens.

    Args:
        exact: The weights before rounding, by which the merge is checked where it was rounded.

    Raises:
        ArtifactError: The saved model's logits or weights are wrong.
    """
    saved = Base.load_folder(folder, torch.float32, base.device, with_tokenizer=False).model
    prompts = prompts or _random_prompts(saved.config.get_text_config().vocab_size)
    measured = difference, scale, _ = _logit_differences(base, saved, prompts)
    if exact:
        own = saved.state_dict(keep_vars=True)
        if wrong := [name for name, tensor in own.items() if not torch.equal(tensor, exact[name].to(dtype).to(tensor))]:
            raise ArtifactError(f"The merged model's {wrong[0]} differs from what was written, so it was not kept.")
        for name, tensor in own.items():
            tensor.copy_(exact[name])
        difference, scale, _ = _logit_differences(base, saved, prompts)
    full = unwrap(base.model.get_input_embeddings()).weight.dtype == torch.float32
    if full and not difference <= 1e-3 * max(scale, 1.0):
        raise ArtifactError(
            f"The merged model's logits differ by {difference:.3g} (largest logit {scale:.3g}), so it was not kept."
        )
    return measured


def _logit_differences(base: Base, saved: Any, prompts: list[list[int]]) -> tuple[float, float, float]:
    difference = scale = 0.0
    same = total = 0
    for ids in prompts:
        row = torch.tensor([ids], device=base.device)
        with without_cudnn():
            ours, theirs = (model(input_ids=row, use_cache=False).logits[0].float() for model in (base.model, saved))
        difference = max(difference, float((ours - theirs).abs().max()))
        scale = max(scale, float(ours.abs().max()))
        same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        total += len(ids)
    return difference, scale, same / total


def _random_prompts(size: int) -> list[list[int]]:
    return torch.randint(size, (4, 16), generator=torch.Generator().manual_seed(0)).tolist()
