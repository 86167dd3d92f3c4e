"""Objectives on pairs: what those that compare two answers to a prompt have in common.

Shapes: U pairs in a pack.
"""

from abc import abstractmethod
from typing import ClassVar, NamedTuple

from torch import Tensor

from trimtab.core.transfer import numbers_like
from trimtab.data import Kind, Pack
from trimtab.objectives._base import KL, Objective, correctness


class Answers(NamedTuple):
    """The chosen or the rejected answers of all pairs."""

    logp: Tensor
    """U, Σ log p of an answer's tokens."""
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
        """U, log p of a token on average."""
        return self.logp / self.tokens


class Pairwise(Objective):
    """An objective on pairs. It makes its reward larger for chosen answers than for rejected ones."""

    data_kind: ClassVar[Kind] = "pairs"

    @abstractmethod
    def pair_losses(self, chosen: Answers, rejected: Answers) -> Tensor:
        """U."""

    @abstractmethod
    def reward(self, answers: Answers) -> Tensor:
        """U."""

    def counts(self, pack: Pack) -> list[float]:
        return [1] * (len(pack.rows) // 2)

    def losses(self, logprobs: Tensor, pack: Pack, kl: KL) -> Tensor:
        return self.pair_losses(*split_pairs(logprobs, pack))

    def measures(self, logprobs: Tensor, pack: Pack, kl: KL) -> dict[str, Tensor]:
        chosen, rejected = split_pairs(logprobs, pack)
        margin = self.reward(chosen) - self.reward(rejected)
        return {
            "accuracy": correctness(margin),
            "margin": margin,
            "chosen_reward": self.reward(chosen),
            "rejected_reward": self.reward(rejected),
            "chosen_logp": chosen.logp,
            "rejected_logp": rejected.logp,
        }


def split_pairs(logprobs: Tensor, pack: Pack) -> tuple[Answers, Answers]:
    """The chosen and the rejected answers of a pack, in which each rejected one follows its chosen one."""
    assert [row.side for row in pack.rows] == ["chosen", "rejected"] * (len(pack.rows) // 2), "pairs stay together"

    def side(start: int) -> Answers:
        rows = pack.rows[start::2]
        reference, tokens = ([row.reference for row in rows], [len(row.target_indices) for row in rows])
        return Answers(logprobs[start::2], numbers_like(reference, logprobs), numbers_like(tokens, logprobs))

    return side(0), side(1)
