"""Checks of a corpus before training: from its totals, from a sample of its blocks, and from the hashes of its documents."""

from collections.abc import Sequence

from trimtab.data.checks import mixture_finding, source_finding, special_tokens
from trimtab.data.example import Example
from trimtab.data.finding import Finding
from trimtab.data.load import LoadedData
from trimtab.data.rendering import Tokenizing


def check_corpus(data: LoadedData, examples: Sequence[Example], base: Tokenizing) -> list[Finding]:
    """What `check_data` checks of rows in memory, as far as it can be known of a corpus.

    Args:
        data: With a corpus.
        examples: Some of its documents, as they were read.
    """
    return [
        *map(source_finding, data.reports),
        *mixture_finding(data),
        _tokens(data),
        Finding("duplicates", "good", "documents that are there twice are not searched for in a corpus", {}),
        _leaks(data),
        special_tokens(data.train, examples, base),
    ]


def _tokens(data: LoadedData) -> Finding:
    corpus = data.corpus
    assert corpus is not None
    message = (
        f"{corpus.targets:,} of {corpus.tokens:,} tokens are targets, of {corpus.documents:,} documents; they are trained on in {len(corpus):,} "
        f"blocks of {corpus.length:,} tokens"
    )
    facts = {"learned": corpus.targets, "tokens": corpus.tokens, "documents": corpus.documents, "blocks": len(corpus)}
    return Finding("tokens", "good", message, facts)


def _leaks(data: LoadedData) -> Finding:
    """Validation documents that are trained on as well, to the token."""
    assert data.corpus is not None
    if not data.eval:
        return Finding(
            "held out", "note", "there are no validation examples, so nothing measures the training: set data.eval", {}
        )
    held_out = sum(len(blocks.held_out) for blocks in data.corpus.sources.values())
    if not held_out:
        message = "whether the validation texts are trained on as well is not searched for in a corpus"
        return Finding("held out", "good", message, {"rows": len(data.eval)})
    leaked = data.corpus.trained_too()
    facts = {"documents": held_out, "learned_too": leaked[:20]}
    total = f"{held_out:,} validation documents"
    if len(leaked) == held_out:
        message = f"all {total} are trained on as well, so their loss would mean nothing: use others"
        return Finding("held out", "problem", message, facts)
    if leaked:
        message = (
            f"of {total}, {len(leaked):,} are trained on as well (the first: {leaked[0]}): their loss looks better than it is"
        )
        return Finding("held out", "note", message, facts)
    return Finding(
        "held out", "good", f"none of {total} is trained on to the token; nearly the same ones are not searched for", facts
    )
