"""Plain texts that need not fit into memory, as blocks of tokens: which block is trained on when is a pure function of the seed."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise

import numpy as np

from trimtab.core.files import json_digest
from trimtab.data.corpus_files import TokenFiles
from trimtab.data.example import TokenRow
from trimtab.data.lengths import LengthLimit
from trimtab.data.mixture import Share, refuse_nothing
from trimtab.data.order import Permutation, apportion
from trimtab.data.plain_texts import Tokens, text_rows
from trimtab.data.rendering import Tokenizing


class Blocks:
    """The tokens of a source as blocks of at most so many.

    All documents that are not held out follow each other, and the blocks divide them where they are full. Each begins with the last
    token of the block before, so that every token but a document's first is a target once. The documents in a block do not see each other.
    """

    def __init__(self, files: TokenFiles, first: int, length: int, held_out: Sequence[int] = (), name: str = "") -> None:
        """
        Args:
            first: The index of a document's first target.
            length: Tokens of a block.
            held_out: The numbers of the documents that are left out.
            name: The source's.
        """
        self.files, self.first, self.length, self.name = files, first, length, name
        self.held_out = sorted(held_out)
        gaps = [files.document(number) for number in self.held_out]
        kept = [(end, start) for (_, end), (start, _) in pairwise([(0, 0), *gaps, (files.tokens, files.tokens)])]
        self._kept = [(start, end) for start, end in kept if start < end]
        """The runs [start, end) of tokens that are trained on."""
        self._before = list(accumulate((end - start for start, end in self._kept), initial=0))
        self.tokens, self.documents = self._before[-1], files.documents - len(self.held_out)
        self.targets = self.tokens - self.first * self.documents

    def __len__(self) -> int:
        return -(-(self.tokens - 1) // (self.length - 1))

    def rows(self, number: int) -> list[TokenRow]:
        """The pieces of documents in a block, as token rows."""
        start = number * (self.length - 1)
        end = min(start + self.length, self.tokens)
        rows: list[TokenRow] = []
        run = bisect_right(self._before, start) - 1
        while start < end:
            first, after = self._kept[run]
            at = first + start - self._before[run]
            until = min(after, at + end - start)
            rows += self._pieces(at, until)
            start, run = start + until - at, run + 1
        return rows

    def _pieces(self, start: int, end: int) -> list[TokenRow]:
        """The pieces of the tokens [start, end), which all are trained on, that have a target."""
        ids, starts = self.files.take(start, end), self.files.starts(start, end)
        rows = []
        for begins, after in pairwise([*starts, end]):
            at = max(begins, start)
            target, length = max(self.first - (at - begins), 1), after - at
            if length > target:
                piece, targets = ids[at - start : after - start].tolist(), list(range(target, length))
                rows.append(TokenRow(piece, targets, self.files.where(begins), length, source=self.name))
        return rows

    def held_out_rows(self, base: Tokenizing) -> list[TokenRow]:
        """The documents that are held out, as token rows of at most a block, as a text that is split has them."""
        limit = LengthLimit(self.length, "split")
        rows = []
        for number in self.held_out:
            start, end = self.files.document(number)
            tokens = Tokens(self.files.take(start, end).tolist(), self.first)
            rows += text_rows(tokens, self.files.where(start), base, limit)
        return [TokenRow(row.ids, row.target_indices, row.where, row.full_length, source=self.name) for row in rows]


@dataclass(frozen=True)
class Corpus:
    """The blocks of all sources, in the order of training."""

    sources: Mapping[str, Blocks]
    weights: Mapping[str, float]
    """Of each source; an epoch has every block once unless given."""
    seed: int

    def __len__(self) -> int:
        """Blocks of an epoch."""
        return self._ends[-1]

    @cached_property
    def per_epoch(self) -> dict[str, int]:
        """How many blocks of an epoch each source has."""
        sizes = {name: len(blocks) for name, blocks in self.sources.items()}
        return apportion(sum(sizes.values()), self.weights) if self.weights else sizes

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(self.per_epoch.values(), initial=0))

    def rows(self, number: int) -> list[TokenRow]:
        """The rows of a block by its number in training, from 0 over all epochs.

        A source is gone through again and again, each time in another order, from where the epoch before stopped.
        """
        epoch, place = divmod(number, len(self))
        drawn = _order(len(self), f"{self.seed}/{epoch}")[place]
        at = bisect_right(self._ends, drawn) - 1
        name, blocks = list(self.sources.items())[at]
        passed, place = divmod(epoch * self.per_epoch[name] + drawn - self._ends[at], len(blocks))
        return blocks.rows(_order(len(blocks), f"{self.seed}/{name}/{passed}")[place])

    def sample(self, blocks: int) -> list[TokenRow]:
        """The rows of the first blocks that are trained on."""
        return [row for number in range(min(blocks, len(self))) for row in self.rows(number)]

    @property
    def length(self) -> int:
        """Tokens of a block."""
        return next(iter(self.sources.values())).length

    @property
    def targets(self) -> int:
        """Target tokens of all sources, each once."""
        return sum(blocks.targets for blocks in self.sources.values())

    @property
    def tokens(self) -> int:
        return sum(blocks.tokens for blocks in self.sources.values())

    @property
    def documents(self) -> int:
        return sum(blocks.documents for blocks in self.sources.values())

    def shares(self, held_out: Mapping[str, int]) -> dict[str, Share]:
        """The share of each named source in an epoch, in blocks.

        Args:
            held_out: Validation examples by source.

        Raises:
            DataError: A source's weight is so small that no block of it would be trained on.
        """
        refuse_nothing(self.per_epoch)
        return {
            name: Share(len(blocks), self.per_epoch[name], self.per_epoch[name] / len(self), held_out.get(name, 0))
            for name, blocks in self.sources.items()
            if name
        }

    @property
    def digest(self) -> str:
        """Of all tokens, and of what divides them into blocks."""
        parts = [(name, of.files.digest, of.first, of.length, of.held_out) for name, of in self.sources.items()]
        return json_digest([parts, sorted(self.weights.items())])

    def trained_too(self) -> list[str]:
        """The places of validation documents of which a document that is trained on has the very tokens, by their hashes."""
        held_out = {name: of.files.contents_of(of.held_out) for name, of in self.sources.items()}
        hashes = np.unique(np.concatenate([*held_out.values(), np.zeros(0, np.uint64)]))
        trained = set[int]()
        for of in self.sources.values():
            excepted = set(of.held_out)
            trained |= {content for number, content in of.files.find_contents(hashes) if number not in excepted}
        return [
            of.files.where(of.files.document(number)[0])
            for name, of in self.sources.items()
            for number, content in zip(of.held_out, held_out[name].tolist(), strict=True)
            if content in trained
        ]


_order = lru_cache(maxsize=64)(Permutation)
