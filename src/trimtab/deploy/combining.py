"""LoRA folders combined into one, as the weighted sum of their changes."""

from collections.abc import Sequence
from pathlib import Path

from trimtab.artifacts import refuse_uncertified
from trimtab.core.errors import RecipeError
from trimtab.deploy.adapter import load_adapter, save_adapter
from trimtab.deploy.loaded_model import adapter_folder, load_model
from trimtab.methods import Combined, combine


def combine_adapters(
    parts: Sequence[tuple[str, float]],
    output: Path | str,
    *,
    rank: int | None = None,
    model: str | None = None,
    certified: bool = False,
) -> Combined:
    """Write the weighted sum of adapters (run or adapter folders) as a new adapter folder.

    Raises:
        RecipeError: A part is not a LoRA adapter.
        ArtifactError: One is damaged, or they were trained on different base models.
        StorageError: The folder exists, or can't be written.
        NotCertified: `certified` is set, and one is of a run that is not certified.
    """
    folders = [adapter_folder(name) for name, _ in parts]
    for (name, _), folder in zip(parts, folders, strict=True):
        if folder is None:
            raise RecipeError(f"{name} is neither a run nor an adapter folder, so it has nothing to combine.")
        if certified:
            refuse_uncertified(folder)
    base = load_model(parts[0][0], model).base
    for number, folder in enumerate(folders[1:], start=1):
        load_adapter(base, folder or Path(), name=str(number))
    weights = {"default" if n == 0 else str(n): weight for n, (_, weight) in enumerate(parts)}
    combined = combine(base.model, weights, "combined", rank)
    trained = {
        "combined": [{"adapter": str(f), "weight": w} for f, (_, w) in zip(folders, parts, strict=True)],
        "error": combined.error,
    }
    save_adapter(base, combined.adapter, output, trained)
    return combined
