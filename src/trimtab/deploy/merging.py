"""Fold an adapter into its base: a plain Transformers folder, checked by loading it and comparing logits."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.base import Base, write_config, write_switches, write_tokenizer
from trimtab.core import files
from trimtab.core.attention_hook import without_cudnn
from trimtab.core.errors import ArtifactError, NotMergeable
from trimtab.methods import Attached, base_modules, unwrap

WELL_KEPT = 0.99
"""Of the adapter's change; what keeps less should not be handed over unread."""


class Merged(NamedTuple):
    """What merging did, measured on the saved folder as Transformers loads it."""

    matrices: int
    max_logit_difference: float
    """Largest difference from the logits of the adapter on its base."""
    logit_scale: float
    """Largest absolute logit, to compare it with."""
    same_choice: float
    """Share of positions whose likeliest token is the same."""
    kept: float
    """How much of the adapter's change is left, once base and sum are rounded to the number type: 1 − ‖lost‖ / ‖change‖."""


@torch.no_grad()
def merge(
    base: Base,
    adapter: Attached,
    folder: Path | str,
    prompts: list[list[int]] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Merged:
    """Write base and adapter as one plain model; the base in memory is left as it is.

    Args:
        folder: A new folder; it appears only if the model in it gives the adapter's logits.
        prompts: Tokens on which the logits are compared; random ones unless given.
        dtype: Of the weights that are written. What is added is float32, and rounded once.

    Raises:
        NotMergeable: The method is not a change of weights, the base is quantized, or the weights exceed the number type.
        ArtifactError: The adapter holds values that are not finite, or the saved model gives other logits.
        StorageError: The folder exists, or can't be written.
    """
    _refuse(base, adapter)
    with files.new_folder(Path(folder)) as new:
        weights = _merged_weights(base, adapter)
        facts = _facts(base, weights) | {"dtype": str(dtype).removeprefix("torch.")}
        kept = _kept(base, weights, dtype)
        exact = {} if dtype == torch.float32 else dict(weights)
        rounded = _rounded(weights, dtype)
        type(base.model).save_pretrained(base.model, new, state_dict=rounded)  # which empties it
        write_config(base.model, new, facts)
        _finish_generation(new, base)
        if base.tokenizer is not None:
            write_tokenizer(base.tokenizer, new, changed=bool(base.added_tokens))
            write_switches(new, base.template_switches)
        report = _compare(base, new, prompts, exact, dtype)
    return Merged(len(adapter.layers), *report, kept)


def _refuse(base: Base, adapter: Attached) -> None:
    """Raise NotMergeable or ArtifactError, if there is nothing that could be merged."""
    if not adapter.method.mergeable:
        raise NotMergeable(
            f"{adapter.method.name} is not a change of weights, so it cannot be merged into the base. Use the adapter beside its "
            "base model instead."
        )
    if base.quantization != "none":
        raise NotMergeable(
            f"{base.source} is quantized ({base.quantization}): its sum with an adapter would have to be rounded again, which loses "
            "much of the adapter, and another base is not what the adapter was trained on. Use the two beside each other; or "
            "train on the base in float32 or bfloat16, and merge that."
        )
    if others := base.added_tokens.keys() - set(adapter.method.new_tokens):
        raise NotMergeable(
            f"Another adapter has added {min(others)!r} to the tokenizer. Load this adapter on a base of its own, to merge it."
        )
    broken = [name for name, p in adapter.parameters().items() if not bool(p.isfinite().all())]
    if broken:
        raise ArtifactError(f"The adapter's {broken[0]} holds values that are not finite, so nothing was merged.")


def _rounded(weights: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The same weights in a number type, tied ones still tied. Raises NotMergeable if it has no numbers so large."""
    done: dict[int, Tensor] = {}
    for name, tensor in weights.items():
        new = done.setdefault(id(tensor), tensor.to(dtype) if tensor.is_floating_point() else tensor)
        if tensor.is_floating_point() and not bool(new.isfinite().all()):
            raise NotMergeable(
                f"{name} holds {float(tensor.abs().max()):.3g}, more than {dtype} can: merge in bfloat16 or float32."
            )
    return {name: done[id(tensor)] for name, tensor in weights.items()}


def _kept(base: Base, weights: dict[str, Tensor], dtype: torch.dtype) -> float:
    """1 − ‖(R(W + D) − R(W)) − D‖ / ‖D‖, over all weights W and what the adapter adds to them, D; R rounds. 0 at least."""
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
    """The whole model's tensors under the names it has without adapters, in float32, tied ones still tied."""
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
            kept = converted.setdefault(id(tensor), tensor.detach().float() if tensor.is_floating_point() else tensor.detach())
            whole = f"{path}.{name}" if path else name
            weights[whole] = merged.get(whole, kept)
    return weights


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's parameters and persistent buffers, without those of the modules in it."""
    yield from module.named_parameters(recurse=False)
    yield from ((n, t) for n, t in module.named_buffers(recurse=False) if n not in module._non_persistent_buffers_set)


def _facts(base: Base, weights: dict[str, Tensor]) -> dict[str, Any]:
    """What a configuration must say of the weights: of how many tokens, and untied where the ends differ (or differed before)."""
    ends = [unwrap(end) for end in (base.model.get_input_embeddings(), base.model.get_output_embeddings())]
    paths = {id(module): path for path, module in base_modules(base.model).items()}
    embeddings, head = (weights[f"{paths[id(end)]}.weight"] for end in ends)
    return {"vocab_size": len(embeddings)} | ({"tie_word_embeddings": False} if embeddings is not head else {})


def _finish_generation(folder: Path, base: Base) -> None:
    """Stop where the model was trained to stop."""
    path = folder / "generation_config.json"
    settings: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if base.tokenizer is not None:
        settings["eos_token_id"] = list(base.stop_ids) if len(base.stop_ids) > 1 else base.stop_ids[0]
    files.write_json(path, settings)


def _compare(
    base: Base, folder: Path, prompts: list[list[int]] | None, exact: dict[str, Tensor], dtype: torch.dtype
) -> tuple[float, float, float]:
    """The largest difference of logits, the largest logit, and how often the likeliest token is the same; `exact` weights before rounding."""
    saved = Base.load_folder(folder, torch.float32, base.device, with_tokenizer=False).model
    prompts = prompts or _random_prompts(saved.config.get_text_config().vocab_size)
    measured = difference, scale, _ = _apart(base, saved, prompts)
    if exact:  # what was written is these weights, rounded; and these are the adapter's
        own = saved.state_dict(keep_vars=True)
        if wrong := [name for name, tensor in own.items() if not torch.equal(tensor, exact[name].to(dtype).to(tensor))]:
            raise ArtifactError(f"The merged model's {wrong[0]} is not what was written, so it was not kept.")
        for name, tensor in own.items():
            tensor.copy_(exact[name])
        difference, scale, _ = _apart(base, saved, prompts)
    plain = unwrap(base.model.get_input_embeddings()).weight.dtype == torch.float32
    if plain and not difference <= 1e-3 * max(scale, 1.0):
        raise ArtifactError(
            f"The merged model's logits differ by {difference:.3g} (largest logit {scale:.3g}), so it was not kept."
        )
    return measured


def _apart(base: Base, saved: Any, prompts: list[list[int]]) -> tuple[float, float, float]:
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
