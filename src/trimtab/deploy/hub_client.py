"""Downloads from the Hugging Face hub, and uploads to it.

The hub's client waits for an answer as long as it takes, and reports what goes wrong as exceptions of several libraries. Here each has
a time limit, and becomes an error that says what to do.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from trimtab.core.errors import RecipeError, StorageError
from trimtab.core.hub import parse_hub_name, unreachable

SECONDS = 30
"""How long the hub may take to answer."""


def refuse_unreachable(name: str) -> None:
    """Raise StorageError at once if the hub can't be reached."""
    if (why := unreachable()) is not None:
        raise StorageError(
            f"{name}: the hub cannot be reached ({why}). Try again later, or write the folder alone: --output FOLDER."
        )


def has_file(name: str, file: str) -> bool:
    """Whether a repository on the hub has a file, which is then downloaded; not if there is no such repository, or none for this user."""
    from huggingface_hub import errors, hf_hub_download

    repository, revision = parse_hub_name(name)
    try:
        with hub_errors(name):
            hf_hub_download(repository, file, revision=revision)
    except RecipeError as error:
        absent = errors.EntryNotFoundError | errors.RepositoryNotFoundError | errors.RevisionNotFoundError
        if isinstance(error.__cause__, errors.LocalEntryNotFoundError) or not isinstance(error.__cause__, absent):
            raise
        return False
    return True


def download(name: str, patterns: Sequence[str], *, cached: bool = False) -> Path:
    """The folder with those files of a repository whose names match, all of one commit; of the cache alone if it is `cached`."""
    from huggingface_hub import snapshot_download

    repository, revision = parse_hub_name(name)
    with hub_errors(name):
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns), local_files_only=cached))


def file_names(name: str) -> list[str]:
    """The names of a repository's files; none if there is no such repository yet."""
    from huggingface_hub import HfApi, errors

    repository, revision = parse_hub_name(name)
    with hub_errors(name):
        try:
            return HfApi().list_repo_files(repository, revision=revision)
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
            return []


def upload(
    folder: Path, repository: str, *, private: bool, branch: str | None, message: str, version: str, remove: Sequence[str] = ()
) -> str:
    """Commit all files of a folder to a repository, which is created if there is none; the address of the commit.

    Args:
        remove: Files there that the same commit removes.

    Raises:
        RecipeError: The user is not logged in, may not write there, or the hub refuses the content.
        StorageError: The hub can't be reached, or fails. Then nothing is committed.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="trimtab", library_version=version)
    with hub_errors(repository):
        api.create_repo(repository, private=private or None, exist_ok=True)
        if branch is not None:
            api.create_branch(repository, branch=branch, exist_ok=True)
        done = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=message,
            revision=branch,
            delete_patterns=list(remove) or None,
        )
        return str(done.commit_url)


@contextlib.contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Give the hub SECONDS for each answer within the block, and say what went wrong.

    Raises:
        RecipeError: The hub refuses it.
        StorageError: The hub can't be reached, or fails.
    """
    from huggingface_hub import errors
    from huggingface_hub.utils import get_session

    session: Any = get_session()
    session.timeout = SECONDS
    try:
        try:
            yield
        except RuntimeError as error:  # an upload's; what went wrong is the cause
            raise error.__cause__ or error from None
    except (errors.HfHubHTTPError, errors.EntryNotFoundError, errors.LocalTokenNotFoundError, ValueError, OSError) as error:
        raise _explained(error, name) from error
    except Exception as error:  # of the library that carries the requests, which has changed and may again
        if not type(error).__module__.startswith(("httpx", "httpcore", "requests", "urllib3")):
            raise
        raise StorageError(f"{name}: {_no_answer(error)}") from error


def _no_answer(error: BaseException) -> str:
    why = f"no answer within {SECONDS} s" if "timeout" in type(error).__name__.lower() else str(error) or type(error).__name__
    return f"the hub cannot be reached ({why}). Try again; nothing is lost."


def _explained(error: Exception, name: str) -> RecipeError | StorageError:
    """The error that says what to do about one of the hub's client."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError):  # nor is it in the cache; what went wrong before is the cause
        if isinstance(error.__cause__, errors.HfHubHTTPError):
            return _explained(error.__cause__, name)
        return StorageError(f"{name}: {_no_answer(error.__cause__ or error)}")
    status = getattr(getattr(error, "response", None), "status_code", None)
    detail = " ".join(str(getattr(error, "server_message", None) or str(error)).split())[:300]
    if isinstance(error, errors.LocalTokenNotFoundError) or status == 401:
        return RecipeError(f"{name}: the hub does not know who you are (or there is no such repository). Log in: hf auth login")
    if status == 403:
        return RecipeError(
            f"{name}: the hub does not let you: {detail} Give a name under your own user or an organization of yours, and log in with a "
            "token that may write: hf auth login"
        )
    if status == 409:
        return RecipeError(
            f"{name}: the hub says that it is taken, or was changed meanwhile: {detail} Try again, or give another name."
        )
    if isinstance(error, errors.EntryNotFoundError | errors.RepositoryNotFoundError | errors.RevisionNotFoundError):
        return RecipeError(f"{name}: the hub has no such repository, revision or file, or none that you may read: {detail}")
    if status is not None and status < 500 and status not in (408, 429):
        return RecipeError(f"{name}: the hub refuses it ({status}): {detail}")
    if status is not None:
        return StorageError(f"{name}: the hub fails ({status}): {detail} Try again later; nothing is lost.")
    if isinstance(error, ValueError):
        return RecipeError(f"{name}: the hub refuses it: {detail}")
    return StorageError(f"{name}: {_no_answer(error)}")
