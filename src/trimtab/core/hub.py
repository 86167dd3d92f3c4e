"""Names on the Hugging Face hub: `org/model`, or `org/model@revision` for a branch, tag or commit."""

import re
from pathlib import Path
from typing import NamedTuple

_NAME = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?")


class HubName(NamedTuple):
    """A name on the hub, in the two parts that its clients take."""

    repository: str
    revision: str | None = None
    """A branch, tag or commit; None for the main branch."""

    @property
    def arguments(self) -> dict[str, str]:
        """The revision as a keyword argument of Transformers' `from_pretrained`, if there is one."""
        return {"revision": self.revision} if self.revision else {}


def is_hub_name(name: str) -> bool:
    """Whether a name can be one on the hub."""
    return _NAME.fullmatch(name) is not None


def parse_hub_name(name: str) -> HubName:
    """A name in its parts; a path or any other name whole, without a revision."""
    match = _NAME.fullmatch(name)
    return HubName(match["repository"], match["revision"]) if match else HubName(name)


def at_revision(name: str, revision: str | None) -> str:
    """A name on the hub at a revision; any other name as it is."""
    known = revision and is_hub_name(name) and parse_hub_name(name).revision is None and not Path(name).exists()
    return f"{name}@{revision}" if known else name
