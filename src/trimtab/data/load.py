"""The data of a run: read, shaped, tokenized, split, and every row accounted for."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from trimtab.core.config import Config, as_tuple
from trimtab.core.errors import DataError, listing
from trimtab.core.files import expand_user, sha256_file
from trimtab.data.example import Account, Column, Example, Kind, TokenRow
from trimtab.data.formats import read_examples
from trimtab.data.order import split
from trimtab.data.preference_formats import SHAPES
from trimtab.data.read import is_local, local_files, read_rows
from trimtab.data.rendering import Tokenizing
from trimtab.data.token_cache import Made, tokenized_once
from trimtab.data.token_rows import make_sequences

FIRST = 20
"""Rows that are looked at before anything else."""


def _count_or_fraction(raw: Any) -> Any:
    if isinstance(raw, float) and raw > 1 and raw % 1:
        raise ValueError(f"expected a fraction below 1 or a whole count, got {raw}.")
    return int(raw) if isinstance(raw, float) and raw >= 1 else raw


class DataConfig(Config):
    """What to learn from."""

    train: Annotated[tuple[str, ...], Field(min_length=1), BeforeValidator(as_tuple)]
    """Files (JSON, JSONL, CSV, TSV, Parquet), patterns such as data/*.jsonl, folders, or datasets on the hub; several make one."""
    eval: Annotated[str | Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0)], BeforeValidator(_count_or_fraction)] = (
        0.05
    )
    """Held-out rows: another file, a fraction of the training rows (below 1), a count of them, or 0 for none."""
    columns: dict[Column, str] = Field(default={})
    """What Trimtab calls a column: what your file calls it; for example {prompt: question, completion: answer}."""
    ignore: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = ()
    """Columns, and keys of messages, that are left out on purpose, where they would be refused because nothing reads them."""
    max_length: Annotated[int, Field(ge=2)] | None = None
    """The most tokens a row may have; the model's context length unless given."""
    overlong: Literal["refuse", "truncate"] = "refuse"
    """What happens to a longer row. One that is cut off teaches the model to stop mid-sentence, or never."""
    bad_rows: Literal["stop", "skip"] = "stop"
    """Whether rows that can't be used stop the run before it starts, or are left out and listed in the run's data.json."""


@dataclass
class Loaded:
    """The data of a run, ready to be packed."""

    train: list[TokenRow]
    eval: list[TokenRow]
    accounts: list[Account]
    digest: str
    """SHA-256 over every token and label, in order: what was learned and what was held out."""

    def plain(self) -> dict[str, Any]:
        """What a run remembers of its data, as JSON data."""
        paths = dict.fromkeys(path for account in self.accounts for name in account.sources for path in local_files(name))
        return {
            "digest": self.digest,
            "sources": [account.plain() for account in self.accounts],
            "files": {str(path): sha256_file(path) for path in paths},
            "held_out": sorted({row.where for row in self.eval}),
        }


def load_examples(
    sources: tuple[str, ...] | str,
    columns: Mapping[Column, str] | None = None,
    kind: Kind = "answers",
    ignore: tuple[str, ...] = (),
) -> tuple[list[Example], Account]:
    """Read rows from one or more sources. See `data.read.read_rows` for what a source can be."""
    examples, account = _reading(sources, columns, kind, ignore)
    return list(examples), account


def _reading(
    sources: tuple[str, ...] | str, columns: Mapping[Column, str] | None, kind: Kind, ignore: tuple[str, ...]
) -> tuple[Iterator[Example], Account]:
    """Rows that are read as they are asked for, and the account that is kept of them meanwhile."""
    sources = (sources,) if isinstance(sources, str) else sources
    account = Account(sources)
    rows = (row for source in sources for row in read_rows(source, account))
    return read_examples(rows, columns or {}, account, SHAPES[kind], ignore), account


def first_examples(config: DataConfig, count: int, kind: Kind = "answers") -> list[Example]:
    """The first usable rows of what is learned, and of a file that is held out, as they were read."""
    sources = [config.train, *([(config.eval,)] if isinstance(config.eval, str) else [])]
    return [
        example for several in sources for example in islice(_reading(several, config.columns, kind, config.ignore)[0], count)
    ]


def look_at_first(config: DataConfig, kind: Kind = "answers") -> None:
    """Read the first rows of every local source, before anything that takes longer. Raises DataError if none of them can be used."""
    for source in (*config.train, *((config.eval,) if isinstance(config.eval, str) else ())):
        if is_local(source):
            account = Account((source,))
            rows = islice(read_rows(source, account), FIRST)
            used = next(read_examples(rows, config.columns, account, SHAPES[kind], config.ignore), None)
            if used is None and config.bad_rows == "stop":
                raise DataError(
                    f"data: none of the first {len(account.refused)} rows of {source} can be used:\n{_reasons(account)}"
                )


def load_data(
    config: DataConfig,
    base: Tokenizing,
    context_length: int | None,
    seed: int,
    kind: Kind = "answers",
    *,
    positions: int = 0,
) -> Loaded:
    """Everything that `config` names, as sequences.

    Args:
        kind: What the objective learns from.
        positions: How much of the context virtual tokens take.

    Raises:
        DataError: A source can't be read, nothing in it can be used, or (unless `bad_rows` is skip) some of it can't.
    """
    read = partial(_tokenized, config=config, base=base, limit=_limit(config.max_length, context_length, positions), kind=kind)
    sequences, account = read(config.train)
    accounts = [account]
    if isinstance(config.eval, str):
        train = sequences
        evaluation, other = read((config.eval,))
        accounts.append(other)
    else:
        rows = list(dict.fromkeys(s.where for s in sequences))  # a row that is given twice is held out in both places
        chosen = _held_out(config.eval, rows, seed)
        train = [s for s in sequences if s.where not in chosen]
        evaluation = [s for s in sequences if s.where in chosen]
    return Loaded(train, evaluation, accounts, _digest(train, evaluation))


def _limit(max_length: int | None, context_length: int | None, positions: int) -> tuple[int | None, str]:
    """The most tokens that a row may have, and what to call that."""
    if context_length is None or (max_length is not None and max_length <= context_length - positions):
        return max_length, f"max_length {max_length or 0:,}"
    left = context_length - positions
    return (
        left,
        f"the {left:,} tokens that {positions} virtual ones leave of the context"
        if positions
        else f"the context length {left:,}",
    )


def _tokenized(
    sources: tuple[str, ...], config: DataConfig, base: Tokenizing, limit: tuple[int | None, str], kind: Kind
) -> Made:
    """The sequences of these sources, and the account of their rows."""
    (most, called), truncate = limit, config.overlong == "truncate"

    def make() -> Made:
        examples, account = _reading(sources, config.columns, kind, config.ignore)
        return make_sequences(examples, base, account, max_length=most, truncate=truncate, limit=called), account

    sequences, account = tokenized_once(
        sources,
        {"kind": kind, "columns": config.columns, "ignore": config.ignore, "max_length": limit, "truncate": truncate},
        base,
        make,
    )
    _settle(account, config)
    return sequences, account


def held_out_examples(config: DataConfig, remembered: dict[str, Any], kind: Kind = "answers") -> list[Example]:
    """The held-out rows of a run again, from its data config and what `Loaded.plain` remembers.

    Raises:
        DataError: A file has changed since, so that its rows are not those.
    """
    for name, digest in remembered["files"].items():
        path = expand_user(name)
        if not path.is_file() or sha256_file(path) != digest:
            raise DataError(
                f"data: {name} has changed since the run or is gone, so its held-out rows are not known. Give rows with --data."
            )
    sources = config.eval if isinstance(config.eval, str) else config.train
    chosen = set(remembered["held_out"])
    examples, _ = load_examples(sources, config.columns, kind, config.ignore)
    return [example for example in examples if example.where in chosen]


def _held_out(wanted: float, rows: list[str], seed: int) -> set[str]:
    count = round(wanted * len(rows)) if wanted < 1 else round(wanted)
    if wanted:
        count = max(count, 1)
        if count >= len(rows):
            raise DataError(
                f"data.eval: {wanted:g} would hold out {count} of {len(rows)} usable rows and leave none to learn from. "
                "Give a smaller fraction or count, a file of its own, or 0."
            )
    return {rows[n] for n in split(len(rows), count, seed)[1]}


def _settle(account: Account, config: DataConfig) -> None:
    problems = _reasons(account)
    if account.used == 0:
        raise DataError(f"data: no row of {account.name} can be used:\n{problems}\n{account}")
    if account.refused and config.bad_rows == "stop":
        too_long = any("up to the end of its last answer, more than" in refusal.reason for refusal in account.refused)
        cut = " (or cut long ones with data.overlong=truncate)" if too_long else ""
        raise DataError(
            f"data: rows that can't be used:\n{problems}\n{account}\nMend them, or leave them out with data.bad_rows=skip{cut}."
        )


def _reasons(account: Account) -> str:
    """Why rows were refused, a line each reason, with the first row that it holds for."""
    places: dict[str, list[str]] = {}
    for where, reason in account.refused:
        places.setdefault(reason, []).append(where)
    return listing([f"{where}{f' and {len(more)} more' if more else ''}: {why}" for why, (where, *more) in places.items()])


def _digest(*parts: list[TokenRow]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(b"part")
        for sequence in part:
            digest.update(f"{sequence.ids}{sequence.target_indices}{sequence.side or ''}".encode())
    return digest.hexdigest()
