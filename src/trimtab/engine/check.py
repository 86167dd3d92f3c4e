"""The check that packing, trees and decoding do not change what a model computes, on the model itself.

Whatever a model does between tokens that Trimtab does not know of (state, an unusual mask, scaled logits) shows here.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from trimtab.base import limit_rows
from trimtab.core.attention_hook import recording_sizes
from trimtab.core.attributes import attributes_set
from trimtab.core.errors import DataError, UnsupportedModel
from trimtab.data.example import TokenRow
from trimtab.data.pack import Pack, pack_tree
from trimtab.data.prefix_tree import lay_out
from trimtab.engine.forward import hidden_states, one_thread, pack_logprobs
from trimtab.engine.head import head_of
from trimtab.engine.layouts import Cache, DecodeLayout, PrefillLayout
from trimtab.engine.own_passes import OwnPasses, explained
from trimtab.engine.pass_mode import PassMode, mode_of
from trimtab.methods import adapters, unwrap
from trimtab.methods._switch import switched

SHARED = 10
"""Tokens of a prefix that two rows of the check share."""
ROWS = (15, 14, 20)
"""Tokens of its rows."""
LOCAL = re.compile(
    r"sliding_window|window_size|chunk_size|local_attention|index_topk|block_size|floor_scale|keep_window|attention_window"
)
"""Names under which configurations hold the size of a window, a chunk or a block, or how many blocks an indexer chooses."""
SHRUNK = 4
"""Tokens of each of these, in the part of the check that exceeds them."""
MOST_TOKENS = 8192
"""Of a row of the check, where sizes do not shrink."""
DECODED = 3


def ensure_checked(model: Any) -> None:
    """`check_packing`, once for all models of one class and configuration in this process. Raises UnsupportedModel."""
    mode = mode_of(model)
    if mode.checked:
        return
    key = (
        type(model),
        unwrap(model.get_input_embeddings()).weight.dtype,
        str(model.device),
        model.config.to_json_string(False),
    )
    if key not in _checked:
        check_packing(model)
        _checked[key] = mode
    known = _checked[key]
    for name, value in vars(known).items():
        setattr(mode, name, value)
    if mode.row_limit is not None:
        limit_rows(model, mode.row_limit)


_checked: dict[Any, PassMode] = {}


def ensure_exact(model: Any, rows: Sequence[TokenRow]) -> None:
    """`ensure_checked`, and that packs compute these rows exactly. Raises UnsupportedModel, or DataError for a row that is too long."""
    ensure_checked(model)
    limit = mode_of(model).row_limit
    for row in rows:
        if limit is not None and len(row.ids) > limit:
            raise DataError(
                f"{row.where}: has {len(row.ids):,} tokens. {type(model).__name__} chooses what tokens attend to, and packs compute that "
                f"exactly for rows of up to {limit:,} tokens. Leave longer examples out, or cut them (data.max_length)."
            )


@torch.no_grad()
def check_packing(model: Any) -> None:
    """Check that this model gives rows in a pack, as a tree and decoded from the cache the log-probabilities that it gives each alone.

    The rows are longer than every window, chunk and block that its configuration names: for this, those are made a few tokens long
    for a moment. A model that computes with its masks gets them; one that cannot continue from a cache generates without.

    Raises:
        UnsupportedModel: The log-probabilities differ.
    """
    off = {adapter.switch: False for adapter in adapters(model).values()}
    with one_thread(), switched(off):
        mode, sizes = mode_of(model), _resizable(model, local_sizes(model))
        with resized(model, sizes, to=max(ROWS)), recording_sizes() as asked:  # packs are longer than that
            fitting = _Rows(model)
            fitting.check(mode)
        if sizes:
            with resized(model, sizes, to=SHRUNK):
                exceeding = _Rows(model)
                changed = max(_difference(a, b) for a, b in zip(exceeding.alone, fitting.alone, strict=True)) > 1e-6
                problem = exceeding.problem(mode) if changed else None
            if problem is not None:
                mode.row_limit = min((s for n, s in sizes.items() if _limits_rows(model, sizes, n, mode)), default=None)
                if mode.row_limit is None:
                    raise problem
                limit_rows(model, mode.row_limit)
            elif not changed and asked and max(asked) <= MOST_TOKENS:
                _Rows(model, max(asked)).check(mode)
        mode.checked = True


def _limits_rows(model: Any, sizes: dict[str, int], name: str, mode: PassMode) -> bool:
    """Whether rows may not exceed the size of this name."""
    with resized(model, sizes, to=max(ROWS)), resized(model, {name: max(ROWS)}, to=SHRUNK):
        return _Rows(model).problem(mode) is not None


def local_sizes(model: Any) -> dict[str, int]:
    """The sizes of windows, chunks and blocks in the text model's configuration, by their names."""
    config = model.config.get_text_config()
    named = {name: getattr(config, name, None) for name in vars(config) if LOCAL.search(name)}
    return {name: size for name, size in named.items() if type(size) is int and size > SHRUNK}


def _resizable(model: Any, sizes: dict[str, int]) -> dict[str, int]:
    """Those with which the model's own forward pass still runs: buffers may have been made for one of the others."""
    left = {}
    for name, size in sizes.items():
        with suppress(UnsupportedModel):
            for new in (SHRUNK, max(ROWS)):
                with resized(model, {name: size}, to=new):
                    _Rows(model)
            left[name] = size
    return left


@contextmanager
def resized(model: Any, sizes: dict[str, int], to: int) -> Iterator[None]:
    """Within the block, all of these sizes are `to`, in the configuration and in the modules that have copied them."""
    config = model.config.get_text_config()
    copies = [
        (module, name, to)
        for module in model.modules()
        for name, value in vars(module).items()
        if type(value) is int and value in sizes.values() and LOCAL.search(name)
    ]
    with attributes_set([*((config, name, to) for name in sizes), *copies]):
        yield


class _Rows:
    """Rows of random tokens, their log-probabilities alone, and the comparison of packs with these."""

    def __init__(self, model: Any, longest: int = 0) -> None:
        self.model, self.name = model, type(model).__name__
        self.device, vocabulary = next(model.parameters()).device, model.config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(0)
        first, second, other = (torch.randint(vocabulary, (n,), generator=generator).tolist() for n in ROWS)
        more = torch.randint(vocabulary, (longest,), generator=generator).tolist()
        self.rows = [first, first[:SHARED] + second[SHARED:], other + more]
        self.own = OwnPasses(model, self.rows)

    @property
    def alone(self) -> list[Tensor]:
        return self.own.logprobs

    def check(self, mode: PassMode) -> None:
        """Compare, and set what is found out. Raises UnsupportedModel."""
        mode.head_scale = self._head_scale()
        try:
            self._check_packed()
        except UnsupportedModel as problem:
            if mode.materialized:
                raise
            mode.materialized = True
            try:
                self._check_packed()
            except UnsupportedModel:
                mode.materialized = False
                raise problem from None
        if mode.caches:
            mode.caches = self._decodes()

    def problem(self, mode: PassMode) -> UnsupportedModel | None:
        """What `check` raises."""
        try:
            self.check(mode)
        except UnsupportedModel as error:
            return error
        return None

    def _head_scale(self) -> float | None:
        """The number in the configuration, or the inverse of one, by which logits are multiplied; None if it is none of them."""
        if not self.own.ratios:
            return None
        config = self.model.config
        numbers = [
            v for part in (config.get_text_config(), config) for n, v in vars(part).items() if "scal" in n or "multipl" in n
        ]
        known = [float(v) for v in numbers if isinstance(v, int | float) and v and type(v) is not bool]
        measured = self.own.ratios[0]
        close = [
            s for s in (1.0, *known, *(1 / v for v in known)) if abs(s - measured) <= 10 * self.own.tolerance * abs(measured)
        ]
        return min(close, key=lambda s: abs(s - measured), default=None)

    def _check_packed(self) -> None:
        rows = [TokenRow(ids, list(range(1, len(ids))), f"check:{n}") for n, ids in enumerate(self.rows)]
        pack: Pack = pack_tree(rows).to(self.device)
        with explained(self.name, "on packed examples", "relates tokens in a way that Trimtab does not know"):
            packed = pack_logprobs(self.model, pack).cpu().double()
        for number, (ours, alone) in enumerate(zip(packed, self.alone, strict=True), start=1):
            if not self.own.is_near(ours, number - 1):
                raise UnsupportedModel(
                    f"{self.name} gives example {number} of {len(rows)} the log-probability {ours:.6g} packed and {alone.sum():.6g} "
                    "alone, so it cannot be trained on packed examples exactly."
                )

    def _decodes(self) -> bool:
        """Whether tokens decoded from the cache have the same log-probabilities, after prompts of different lengths."""
        rows = self.rows[1:]
        cuts = [len(row) - DECODED for row in rows]
        cache, tree = Cache(), lay_out([row[:cut] for row, cut in zip(rows, cuts, strict=True)])
        try:
            ids, positions = (torch.from_numpy(array).to(self.device) for array in (tree.ids, tree.positions))
            hidden_states(self.model, ids, positions, PrefillLayout(tree, cache, self.device))
            decoded = []
            for step in range(DECODED - 1):
                layout = DecodeLayout(cache)
                tokens = torch.tensor([row[cut + step] for row, cut in zip(rows, cuts, strict=True)], device=self.device)
                hidden = hidden_states(self.model, tokens, cache.lengths, layout)
                layout.advance()
                decoded.append(head_of(self.model).logits(hidden).cpu().double().log_softmax(-1))
        except Exception:  # whatever a model's own code raises where there are no earlier tokens
            return False
        for number, (row, cut) in enumerate(zip(rows, cuts, strict=True)):
            ours = torch.stack([decoded[step][number, row[cut + step + 1]] for step in range(DECODED - 1)]).sum()
            if not self.own.is_near(ours, number + 1, slice(cut, cut + DECODED - 1)):
                return False
        return True


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())
