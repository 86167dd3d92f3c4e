"""Several LoRA folders as one: a weighted sum of what they change."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from trimtab.artifacts import refuse_uncertified
from trimtab.core.errors import RecipeError
from trimtab.deploy.adapter import load_adapter, save_adapter
from trimtab.deploy.target import adapter_folder, open_target
from trimtab.methods import Attached, combine


class CombinedFolders(NamedTuple):
    """What combining did."""

    adapter: Attached
    rank: int
    """The largest of any matrix."""
    error: float
    """How much of the sum is missing, as `methods.combine` says."""


def combine_adapters(
    parts: Sequence[tuple[str, float]],
    output: Path | str,
    *,
    rank: int | None = None,
    model: str | None = None,
    certified: bool = False,
) -> CombinedFolders:
    """Write the weighted sum of adapters (run or adapter folders) as a new adapter folder.

    Raises:
        RecipeError: A part is not an adapter, or not LoRA's.
        ArtifactError: One is damaged, or they were trained on different bases.
        StorageError: The folder exists, or can't be written.
        NotCertified: One is of a run that is not certified, and `certified` asks for that.
    """
    folders = [adapter_folder(name) for name, _ in parts]
    for (name, _), folder in zip(parts, folders, strict=True):
        if folder is None:
            raise RecipeError(f"{name} is neither a run nor an adapter folder, so there is nothing in it to combine.")
        if certified:
            refuse_uncertified(folder)
    base = open_target(parts[0][0], model).base
    for number, folder in enumerate(folders[1:], start=1):
        load_adapter(base, folder or Path(), name=str(number))
    weights = {"default" if n == 0 else str(n): weight for n, (_, weight) in enumerate(parts)}
    done = combine(base.model, weights, "combined", rank)
    ranks = [len(tensor) for name, tensor in done.adapter.state().items() if name.endswith(".A")]
    trained = {
        "combined": [{"adapter": str(f), "weight": w} for f, (_, w) in zip(folders, parts, strict=True)],
        "error": done.error,
    }
    save_adapter(base, done.adapter, output, trained)
    return CombinedFolders(done.adapter, max(ranks), done.error)
