"""Full fine-tuning: every weight is trained, or all but some. The yardstick of the other methods."""

from typing import Any, ClassVar, Self

from torch import Tensor, nn

from trimtab.core.errors import RecipeError
from trimtab.core.wrapping import modules
from trimtab.methods._base import AdapterLayer, LearningRateContext, Method
from trimtab.methods._peft import not_pefts
from trimtab.methods._targets import Patterns, Targets
from trimtab.methods._weight_copies import ALL, CopyLayer, count, own_weights, within


class Full(Method):
    """Trains copies of the model's own weights; the base stays as it is, so switching the adapter off gives it back.

    What is tied (embeddings and head, mostly) stays tied, and is trained or frozen together.
    """

    peft_type: ClassVar[str | None] = None

    targets: Targets = (ALL,)
    """What is trained: `all`, or names (`mlp`, `layers.0`, `lm_head`) or regular expressions of modules, with all that is in them."""
    freeze: Patterns = ()
    """What of that is not, in the same words: `embed_tokens`."""

    def sites(self, model: nn.Module) -> list[str]:
        owned = {path: {id(weight) for _, weight in own_weights(module)} for path, module in modules(model).items()}
        owned = {path: weights for path, weights in owned.items() if weights}

        def tied(chosen: set[str]) -> set[str]:
            weights = set().union(*(owned[path] for path in chosen))
            return {path for path in owned if owned[path] & weights}

        trained = tied(within(model, owned, self.targets, "targets")) - tied(within(model, owned, self.freeze, "freeze"))
        if not trained:
            raise RecipeError("freeze: leaves nothing to train.")
        return [path for path in owned if path in trained]

    def layer(self, base: nn.Module, path: str) -> CopyLayer:
        return CopyLayer(base, path)

    def join(self, layers: dict[str, AdapterLayer]) -> None:
        copies: dict[int, Tensor] = {}
        for layer in layers.values():
            for name, weight in own_weights(layer.base):
                setattr(layer, name, copies.setdefault(id(weight), getattr(layer, name)))

    def parameter_count(self, model: nn.Module) -> int:
        """All that the chosen modules own, tied ones counted once."""
        return count(model, self.sites(model))

    def learning_rate(self, at: LearningRateContext) -> tuple[float, str]:
        """1e-4, by a small search: see docs/methods.md."""
        return 1e-4, "1e-4"

    def to_peft(self, model: nn.Module, tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return not_pefts(self.name), tensors

    @classmethod
    def from_peft(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[Self, dict[str, Tensor]]:
        return cls(), tensors
