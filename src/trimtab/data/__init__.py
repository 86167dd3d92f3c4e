"""From a data file to token rows and packs."""

from trimtab.data.bin_packing import largest_group_tokens
from trimtab.data.checks import EXAMPLES_CHECKED, check_data, refuse_problems
from trimtab.data.config import READING, DataConfig
from trimtab.data.corpus import Corpus
from trimtab.data.corpus_checks import check_corpus
from trimtab.data.example import (
    Conversation,
    Example,
    Judged,
    Kind,
    Preference,
    RejectedExample,
    SourceReport,
    Text,
    TokenRow,
    row_groups,
)
from trimtab.data.examples import check_first_examples, first_examples, held_out_examples, load_examples
from trimtab.data.finding import Finding
from trimtab.data.lengths import LengthLimit
from trimtab.data.load import (
    LoadedData,
    load_data,
    load_rows,
)
from trimtab.data.order import plan_steps
from trimtab.data.pack import Pack, pack_all, pack_flat, pack_tree
from trimtab.data.prefix_tree import Segment, Tree, lay_out
from trimtab.data.source import Objects, Source
from trimtab.data.token_rows import last_answer_start, tokenize_answers, tokenize_examples, tokenize_prompt

__all__ = [
    "EXAMPLES_CHECKED",
    "READING",
    "Conversation",
    "Corpus",
    "DataConfig",
    "Example",
    "Finding",
    "Judged",
    "Kind",
    "LengthLimit",
    "LoadedData",
    "Objects",
    "Pack",
    "Preference",
    "RejectedExample",
    "Segment",
    "Source",
    "SourceReport",
    "Text",
    "TokenRow",
    "Tree",
    "check_corpus",
    "check_data",
    "check_first_examples",
    "first_examples",
    "held_out_examples",
    "largest_group_tokens",
    "last_answer_start",
    "lay_out",
    "load_data",
    "load_examples",
    "load_rows",
    "pack_all",
    "pack_flat",
    "pack_tree",
    "plan_steps",
    "refuse_problems",
    "row_groups",
    "tokenize_answers",
    "tokenize_examples",
    "tokenize_prompt",
]  # fmt: skip
