"""A source of examples: as a recipe names it, or objects in memory."""

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from trimtab.core.config import Config
from trimtab.data.column_templates import ColumnTemplate
from trimtab.data.example import Column


class Source(Config):
    """A source of examples. What it says about reading stands in the place of what the section `data` says."""

    path: Annotated[str, Field(min_length=1)]
    """A file, a pattern of files, a folder, or a dataset on the hub; as `data.train` takes it without a name."""
    subset: str | None = None
    """Which subset (configuration) of a dataset on the hub, or of a folder with a copy of one; its only or default one unless given."""
    split: str | None = None
    """Which split of such a dataset, or of a folder that `datasets` saved, or a part of one, such as train[:1000]; train unless given."""
    revision: str | None = None
    """Which branch, tag or commit of a dataset on the hub; the main branch, which may change, unless given."""
    weight: Annotated[float, Field(gt=0)] | None = None
    """Its share of each epoch is its weight, divided by the sum of all; unless given, every example is trained on once an epoch."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """The most examples that are taken from it: a random sample, decided by the seed; of a stream or a corpus, the first ones."""
    columns: dict[Column, str] | None = None
    """As `data.columns`, which it stands in the place of."""
    prompt: ColumnTemplate | None = None
    """As `data.prompt`, which it stands in the place of."""
    completion: ColumnTemplate | None = None
    """As `data.completion`, which it stands in the place of."""


@dataclass(frozen=True)
class Objects:
    """Rows in memory as a source: a list of dicts, or a dataset or stream of `datasets`."""

    rows: Any
    path: str
    """What the places of its rows begin with."""
    limit: int | None = None
    subset = split = revision = columns = prompt = completion = None
