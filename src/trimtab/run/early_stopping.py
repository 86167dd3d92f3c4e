"""Early stopping: when evaluations in a row have not improved on an earlier one, beyond what noise explains."""

from dataclasses import dataclass, field, replace

from trimtab.evaluate import Loss, paired_difference


@dataclass(frozen=True)
class Standing:
    """The evaluation that later ones have to improve on, and those since then. It is part of the state of training."""

    step: int
    loss: float
    sums: list[float]
    """The loss of each of its rows: the same rows are evaluated every time, so differences between rows do not count as noise."""
    waited: int = 0
    """Evaluations since then; none of them improved on it."""
    latest: list[float] = field(default_factory=list)
    """Of the last one: the difference of its loss to this, and the ends of its 95 % interval."""

    def after(self, step: int, evaluated: Loss, least: float) -> "Standing":
        """The standing after another evaluation: that one's, if it has improved by more than `least` beyond noise."""
        difference, (low, high) = paired_difference(evaluated.sums, self.sums, evaluated.counts)
        if high < -least:
            return Standing(step, evaluated.loss, evaluated.sums)
        return replace(self, waited=self.waited + 1, latest=[difference, low, high])

    def reason(self, step: int, best: float) -> str:
        """Why a run ends after this step, for people to read."""
        difference, low, high = self.latest
        told = (
            "it is distinguishably worse"
            if low > 0
            else "it can't be told from no difference"
            if high > 0
            else "it is too little"
        )
        return (
            f"stopped early after step {step}: no improvement of the validation loss beyond noise in {self.waited} "
            f"evaluation{'s' if self.waited > 1 else ''} since step {self.step}, where it was {self.loss:.4f}. Its difference now is "
            f"{difference:+.4f} (95 % interval {low:+.4f} to {high:+.4f}): {told}. The best was {best:.4f}."
        )
