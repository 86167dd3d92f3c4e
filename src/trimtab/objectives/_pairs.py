"""What the objectives that compare two answers to a prompt have in common.

Shapes: U pairs in a pack.
"""

from abc import abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from trimtab.data import Kind, Pack
from trimtab.objectives._base import Objective, right


class Answers(NamedTuple):
    """One side of every pair."""

    logp: Tensor
    """U, Σ log p of its tokens."""
    reference: Tensor
    """U, the same in the reference model."""
    tokens: Tensor
    """U, how many those are."""

    @property
    def ratio(self) -> Tensor:
        """U, Σ log p / p_reference."""
        return self.logp - self.reference

    @property
    def mean(self) -> Tensor:
        """U, log p of a token in the mean."""
        return self.logp / self.tokens


class Pairwise(Objective):
    """An objective that learns from pairs. Its reward of an answer is what it makes larger for chosen ones than for rejected ones."""

    data_kind: ClassVar[Kind] = "pairs"

    @abstractmethod
    def pair_losses(self, chosen: Answers, rejected: Answers) -> Tensor:
        """U."""

    @abstractmethod
    def reward(self, answers: Answers) -> Tensor:
        """U."""

    def counts(self, pack: Pack) -> list[int]:
        return [1] * (len(pack.rows) // 2)

    def losses(self, logprobs: Tensor, pack: Pack, kl: float) -> Tensor:
        return self.pair_losses(*sides(logprobs, pack))

    def measures(self, logprobs: Tensor, pack: Pack, kl: float) -> dict[str, Tensor]:
        chosen, rejected = sides(logprobs, pack)
        margin = self.reward(chosen) - self.reward(rejected)
        return {
            "accuracy": right(margin),
            "margin": margin,
            "chosen_reward": self.reward(chosen),
            "rejected_reward": self.reward(rejected),
            "chosen_logp": chosen.logp,
            "rejected_logp": rejected.logp,
        }


def sides(logprobs: Tensor, pack: Pack) -> tuple[Answers, Answers]:
    """The chosen and the rejected answers of a pack, in which each rejected one stands behind its chosen one."""
    numbers = range(0, len(pack.rows), 2)
    found = [pack.rows[n + k].side for n in numbers for k in (0, 1)]
    assert found == ["chosen", "rejected"] * len(numbers), "pairs stay together"

    def side(start: int) -> Answers:
        rows = pack.rows[start::2]
        reference, tokens = ([row.reference for row in rows], [len(row.target_indices) for row in rows])
        return Answers(
            logprobs[start::2], *(torch.tensor(x, dtype=logprobs.dtype, device=logprobs.device) for x in (reference, tokens))
        )

    return side(0), side(1)
