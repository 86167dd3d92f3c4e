"""Full fine-tuning: trains every weight, or all but some. The yardstick of the other methods."""

from typing import ClassVar

from torch import nn

from trimtab.core.errors import RecipeError
from trimtab.core.wrapping import text_modules
from trimtab.methods import ALL, AdapterLayer, Method, Patterns, Targets, select_modules
from trimtab.methods._layers import Layers
from trimtab.methods._structure import own_weights
from trimtab.methods._weight_copies import WeightCopyLayer, count_parameters


class Full(Method):
    """Trains copies of the model's own weights; the base stays as it is, so switching the adapter off restores it.

    What is tied (embeddings and head, mostly) stays tied, and is trained or frozen together.
    """

    auto_lr: ClassVar[str] = "1e-4"

    targets: Targets = (ALL,)
    """Which modules are trained: `all`, or names (`mlp`, `layers.0`, `lm_head`) or regular expressions, with all modules inside."""
    freeze: Patterns = ()
    """Which of those are not, named in the same way: `embed_tokens`."""

    layers: Layers = None

    def sites(self, model: nn.Module) -> list[str]:
        owned = {path: {id(weight) for _, weight in own_weights(module)} for path, module in text_modules(model).items()}
        owned = {path: weights for path, weights in owned.items() if weights}

        def tied(chosen: set[str]) -> set[str]:
            weights = set().union(*(owned[path] for path in chosen))
            return {path for path in owned if owned[path] & weights}

        trained = tied(select_modules(model, owned, self.targets, "targets", self.layers))
        trained -= tied(select_modules(model, owned, self.freeze, "freeze"))
        if not trained:
            raise RecipeError("freeze: leaves nothing to train.")
        return [path for path in owned if path in trained]

    def layer(self, base: nn.Module, path: str) -> WeightCopyLayer:
        return WeightCopyLayer(base, path)

    def tie_parameters(self, layers: dict[str, AdapterLayer]) -> None:
        copies: dict[int, nn.Parameter] = {}
        for layer in layers.values():
            for name, weight in own_weights(layer.base):
                layer.register_parameter(name, copies.setdefault(id(weight), layer.own_parameters()[name]))

    def parameter_count(self, model: nn.Module) -> int:
        """All that the chosen modules own, tied ones counted once."""
        return count_parameters(model, self.sites(model))
