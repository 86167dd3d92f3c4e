"""Names on the Hugging Face hub: `org/model`, or `org/model@revision` for a branch, tag or commit; and what is in its cache."""

import re
import socket
import urllib.parse
import urllib.request
from pathlib import Path
from typing import NamedTuple

_SNAPSHOT = re.compile(r"models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)/snapshots/(?P<commit>[0-9a-f]{7,64})")

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


def cached_name(folder: Path | str) -> HubName | None:
    """The name and commit of a folder in the hub's cache; None for any other folder."""
    match = _SNAPSHOT.search(Path(folder).as_posix())
    return HubName(f"{match['owner']}/{match['name']}", match["commit"]) if match else None


def names_hub(name: str) -> bool:
    """Whether a name can only be meant for the hub: nothing of it is here."""
    path = Path(name)
    return is_hub_name(name) and not path.exists() and not Path(path.parts[0]).is_dir()


def unreachable() -> str | None:
    """Why the hub can't be reached, at once; None if it can. The hub's own client tries for a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    if urllib.request.getproxies():
        return None
    address = urllib.parse.urlsplit(constants.ENDPOINT)
    try:
        with socket.create_connection((address.hostname, address.port or 443), timeout=10):
            return None
    except OSError as error:
        return f"{address.hostname}: {error.strerror or error}"


def cached_file(name: str, file: str) -> Path | bool | None:
    """A file of a repository in the hub's cache; False if it is known that the repository has none, None if nothing is known."""
    from huggingface_hub import try_to_load_from_cache

    repository, revision = parse_hub_name(name)
    found = try_to_load_from_cache(repository, file, revision=revision)
    return Path(found) if isinstance(found, str) else None if found is None else False
