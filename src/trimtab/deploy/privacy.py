"""What must not leave this machine when a folder is published: secrets, and paths that say who and where its user is."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_SECRETS = {
    "a token of the Hugging Face hub": r"\b(hf|api_org)_[A-Za-z0-9]{20,}",
    "a key of OpenAI or Anthropic": r"\bsk-[A-Za-z0-9_-]{20,}",
    "a token of GitHub": r"\b(gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,})",
    "a key of AWS": r"\b(AKIA|ASIA)[A-Z0-9]{16}\b",
    "a key of Google": r"\bAIza[A-Za-z0-9_-]{30,}",
    "a token of Slack": r"\bxox[abpr]-[A-Za-z0-9-]{10,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a password in an address": r"\b[a-z][a-z0-9+.-]*://[^\s/:@]+:[^\s/@]+@",
}
_SECRET_VARIABLE = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY)S?$", re.IGNORECASE)
_WHOLE = re.compile(r"(~|\.{0,2}/|[A-Za-z]:[\\/]|\\\\|file://)\S.*", re.DOTALL)
"""A text that is a path, and not a name."""
_INSIDE = re.compile(r"(?<![\w./:\\-])(~\w*|[A-Za-z]:)?[/\\](?:[^\s/\\'\"`,;()\[\]{}<>|]+[/\\])+(?=[^\s/\\])")
"""The folders of a path within a sentence."""
_PEOPLE = re.compile(r"[/\\](home|Users|users)[/\\][^/\\\s]+")


def without_folders(value: Any) -> Any:
    """JSON data with the last part of each local path alone; names and texts as they are."""
    if isinstance(value, dict):
        return {without_folders(key): without_folders(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(item) for item in value]
    if not isinstance(value, str):
        return value
    if _WHOLE.fullmatch(value) and "\n" not in value:
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return _INSIDE.sub("", value)


def leaks(text: str, folders: tuple[Path, ...] = ()) -> Iterator[str]:
    """What a text gives away, in words that do not repeat it.

    Args:
        folders: Folders of this machine whose paths must not be in it, besides the user's.
    """
    for what, pattern in _SECRETS.items():
        if re.search(pattern, text):
            yield what
    for name, value in os.environ.items():
        if _SECRET_VARIABLE.search(name) and len(value) >= 8 and value in text:
            yield f"the value of the environment variable {name}"
    if _PEOPLE.search(text):
        yield "the path of a user's folder"
    for folder in (Path.home(), Path.cwd(), *folders):
        if len(folder.parts) > 1 and re.search(r"(?<![\w.-])" + re.escape(str(folder)) + r"(?![\w-])", text):
            yield "the path of a folder of this machine"
            return
