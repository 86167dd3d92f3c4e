"""A model without its weights: what its configuration alone says of its modules and their sizes."""

from pathlib import Path
from typing import Any

from trimtab.base import locate
from trimtab.base.loading import read_skeleton
from trimtab.base.supported import refuse_unsupported
from trimtab.core.errors import StorageError, TrimtabError, UnsupportedModel


def skeleton(name: str) -> Any:
    """The modules of a model on the `meta` device, where tensors have shapes and no values; no weights are read.

    Args:
        name: See ModelConfig.

    Raises:
        RecipeError, UnsupportedModel, StorageError: As `Base.load`.
    """
    place: Path | str | None = locate.folder_of(name)
    if place is None:
        locate.check_hub(name)
        place = name
    try:
        model = read_skeleton(place)
    except TrimtabError:
        raise
    except Exception as error:  # see Base.load_folder
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if isinstance(place, str):
            raise StorageError(
                f"model: {place} is no local folder, and its configuration could not be fetched: {reason}"
            ) from error
        raise UnsupportedModel(f"model: {place}: its configuration cannot be used: {type(error).__name__}: {reason}") from error
    refuse_unsupported(model, None)
    return model
