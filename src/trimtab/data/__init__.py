"""From a data file to packs of tokens."""

from trimtab.data.bin_packing import most_together
from trimtab.data.checks import COMPARED, Finding, prove, refuse_problems
from trimtab.data.example import (
    Account,
    Conversation,
    Example,
    Judged,
    Kind,
    Preference,
    Refusal,
    Text,
    TokenRow,
    units,
)
from trimtab.data.load import (
    DataConfig,
    Loaded,
    first_examples,
    held_out_examples,
    load_data,
    load_examples,
    look_at_first,
)
from trimtab.data.order import plan_steps
from trimtab.data.pack import Pack, pack_all, pack_flat, pack_tree
from trimtab.data.prefix_tree import Segment, Tree, lay_out
from trimtab.data.read import absolute_source
from trimtab.data.token_rows import asked, last_run, make_sequences, prompt_of

__all__ = [
    "COMPARED",
    "Account",
    "Conversation",
    "DataConfig",
    "Example",
    "Finding",
    "Judged",
    "Kind",
    "Loaded",
    "Pack",
    "Preference",
    "Refusal",
    "Segment",
    "Text",
    "TokenRow",
    "Tree",
    "absolute_source",
    "asked",
    "first_examples",
    "held_out_examples",
    "last_run",
    "lay_out",
    "load_data",
    "load_examples",
    "look_at_first",
    "make_sequences",
    "most_together",
    "pack_all",
    "pack_flat",
    "pack_tree",
    "plan_steps",
    "prompt_of",
    "prove",
    "refuse_problems",
    "units",
]  # fmt: skip
