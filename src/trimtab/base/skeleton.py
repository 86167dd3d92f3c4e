"""A model without its weights: shapes alone."""

from typing import Any

from trimtab.base import locate
from trimtab.base.loading import explaining_failure, read_skeleton
from trimtab.base.quantized import Quantize
from trimtab.base.stored_quantization import held_quantization, stored_quantization
from trimtab.base.supported import refuse_unsupported


def skeleton(name: str) -> Any:
    """A model on the `meta` device, where tensors have shapes and no values; no weights are read.

    Args:
        name: See ModelConfig.

    Raises:
        RecipeError, UnsupportedModel, StorageError: As `Base.load`.
    """
    place = locate.loadable_place(name, weights=False)
    with explaining_failure(place):
        stored_quantization(place)
        model = read_skeleton(place)
    refuse_unsupported(model, None)
    return model


def quantization_when_loaded(name: str, quantize: Quantize) -> Quantize:
    """How a model of this name is held: quantized while it is loaded, or as it is stored. No weights are read. Raises as `skeleton` does."""
    place = locate.loadable_place(name, weights=False)
    with explaining_failure(place):
        return held_quantization(place, quantize)
