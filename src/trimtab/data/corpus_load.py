"""Loads the corpus of a run: its texts as tokens in the cache, some of which are held out."""

from dataclasses import dataclass

from trimtab.core.errors import DataError
from trimtab.data.config import FEWEST_TOKENS, DataConfig
from trimtab.data.corpus import Blocks, Corpus
from trimtab.data.corpus_tokens import OnStage, Tokenized
from trimtab.data.example import SourceReport, TokenRow
from trimtab.data.held_out import held_out_counts
from trimtab.data.order import validation
from trimtab.data.rendering import Tokenizing

MOST_HELD_OUT = 8_000_000
"""Validation tokens, which are held in memory and evaluated each time."""
SAMPLE = 64
"""Blocks whose rows are checked before training, and initialize the methods that start from examples."""


@dataclass
class LoadedCorpus:
    """A corpus, and what belongs to it."""

    corpus: Corpus
    held_out: list[TokenRow]
    reports: list[SourceReport]
    digests: dict[str, str]
    """SHA-256 of every file that it was made of."""


def load_corpus(config: DataConfig, base: Tokenizing, length: int | None, seed: int, on_stage: OnStage) -> LoadedCorpus:
    """The corpus of the training sources.

    Args:
        length: Tokens of a block.

    Raises:
        DataError: A source can't be read, or (unless `bad_rows` is skip) some of its documents can't be used.
        StorageError: The cache can't be written; what was tokenized before stays.
    """
    if length is None:
        raise DataError("data.max_length: the model's configuration has no context length, so give the tokens of a block.")
    if length < FEWEST_TOKENS:
        raise DataError(
            f"data.max_length: the context leaves {length} tokens, and blocks of a corpus have at least {FEWEST_TOKENS}."
        )
    tokenized = {name: Tokenized(name, sources, config, base, on_stage) for name, sources in config.train_sources.items()}
    sizes = {name: of.files.documents for name, of in tokenized.items()}
    counts = held_out_counts(0 if config.eval_sources else config.eval, sizes)
    blocks: dict[str, Blocks] = {}
    for name, of in tokenized.items():
        held_out = validation(sizes[name], counts[name], f"{seed}/{name}" if name else seed)
        blocks[name] = Blocks(of.files, of.first, length, held_out, name)
    tokens, documents = (sum(of.files.tokens - of.tokens for of in blocks.values()), sum(counts.values()))
    refuse_much(tokens, f"{config.eval} holds out {documents:,} documents", documents)
    rows = [row for of_source in blocks.values() for row in of_source.held_out_rows(base)]
    digests = {path: digest for of in tokenized.values() for path, digest in of.digests.items()}
    return LoadedCorpus(Corpus(blocks, config.weights, seed), rows, [of.report for of in tokenized.values()], digests)


def refuse_much(tokens: int, said: str, documents: int) -> None:
    """Raise DataError for too many validation tokens.

    Args:
        said: What holds them out.
    """
    if tokens > MOST_HELD_OUT:
        fewer = max(1, documents * MOST_HELD_OUT // tokens // 2)
        raise DataError(
            f"data.eval: {said} with {tokens:,} tokens. They are held in memory and evaluated each time, so there may be {MOST_HELD_OUT:,}: "
            f"give fewer, such as data.eval={fewer}."
        )
