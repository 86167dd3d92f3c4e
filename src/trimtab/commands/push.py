"""`trimtab push`: an adapter or merged model, with a model card, to the Hugging Face hub."""

import argparse
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.commands._parser import add_force
from trimtab.commands._terminal import status, terminal
from trimtab.core import hub
from trimtab.core.errors import RecipeError

if TYPE_CHECKING:
    from trimtab.deploy.publication import Publication

HELP = "push an adapter, or the merged model, to the Hugging Face hub with a model card"
DESCRIPTION = (
    "Pushed are the adapter, its tokenizer, and what the run knows: recipe, certificate and a model card with the results. Local paths, "
    "examples' texts and secrets are not. Log in with `hf auth login`."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="TARGET", help="a run folder or an adapter folder")
    parser.add_argument("name", metavar="ORG/NAME", help="the repository; it is created if there is none of that name")
    parser.add_argument(
        "--merged", action="store_true", help="push the base model with the adapter merged into it, in its dtype of training"
    )
    parser.add_argument("--private", action="store_true", help="create the repository as a private one")
    parser.add_argument(
        "--revision", metavar="BRANCH", help="commit to this branch, which is created if there is none; main unless given"
    )
    parser.add_argument(
        "--output", metavar="FOLDER", type=Path, help="write the folder that would be pushed, and use no network"
    )
    parser.add_argument(
        "--base-model",
        metavar="ORG/NAME",
        help="the base model's name on the hub, if it was loaded from a folder: for the card and for PEFT",
    )
    add_force(parser)


def run(arguments: argparse.Namespace) -> None:
    from trimtab.core import files
    from trimtab.deploy import hub_client

    for option, name in (("ORG/NAME", arguments.name), ("--base-model", arguments.base_model)):
        if name is not None and not (hub.is_hub_name(name) and (option != "ORG/NAME" or "@" not in name)):
            raise RecipeError(f"{option}: expected a name on the hub such as org/name, got {name!r}.")
    if arguments.output is not None:
        files.refuse_existing(arguments.output)
    else:
        hub_client.refuse_unreachable(arguments.name)
    folder_to_fill: AbstractContextManager[Path]
    folder_to_fill = files.new_folder(arguments.output) if arguments.output is not None else files.passing_folder()
    console = terminal()
    with status(console) as stage, folder_to_fill as new:
        about, names = _fill(arguments, new, stage)
        address = ""
        if arguments.output is None:
            stage(f"pushing {len(names)} files to {arguments.name}")
            address = _push(arguments, new, about, names)
    _report(console, arguments, names, address)


def _fill(arguments: argparse.Namespace, new: Path, stage: Any) -> tuple["Publication", list[str]]:
    """Write what is pushed into a folder; returned are what is known about it, and its files' names."""
    stage("reading the adapter")
    from trimtab.artifacts import read_adapter, refuse_uncertified
    from trimtab.deploy.base_facts import base_facts
    from trimtab.deploy.loaded_model import adapter_folder
    from trimtab.deploy.model_card import model_card
    from trimtab.deploy.publication import publication, write_publication

    folder = adapter_folder(arguments.target)
    if folder is None:
        raise RecipeError(f"{arguments.target} is neither a run nor an adapter folder, so there is nothing to push.")
    if not arguments.force:
        refuse_uncertified(folder)
    base = base_facts(read_adapter(folder).source, arguments.base_model, online=arguments.output is None)
    about = publication(folder, arguments.name, base, merged=arguments.merged)
    about.branch = arguments.revision
    if arguments.merged:
        stage("merging")
        _merge(arguments, about, new)
    return about, write_publication(new, folder, about, model_card)


def _merge(arguments: argparse.Namespace, about: "Publication", new: Path) -> None:
    import torch

    from trimtab.deploy import COPIES, load_model, merge

    target = load_model(arguments.target, copies=COPIES)
    assert target.adapter is not None, "an adapter's folder"
    merge(target.base, target.adapter, new / "merged", dtype=getattr(torch, about.adapter.base["model"]["dtype"]))
    for file in (new / "merged").iterdir():
        file.rename(new / file.name)
    (new / "merged").rmdir()


def _push(arguments: argparse.Namespace, new: Path, about: "Publication", names: list[str]) -> str:
    from trimtab import __version__
    from trimtab.deploy import hub_client
    from trimtab.deploy.publication import replaced_files

    branch = f"{arguments.name}@{arguments.revision}" if arguments.revision else arguments.name
    there = hub_client.file_names(branch) or hub_client.file_names(arguments.name)  # of which a new branch is made
    other = "adapter_config.json" if arguments.merged else "config.json"
    if other in there:
        raise RecipeError(
            f"{arguments.name} on the hub holds {'an adapter' if arguments.merged else 'a model'} ({other}), and both in one repository are "
            "not read as either. Give another name."
        )
    what = "merged model" if arguments.merged else f"{(about.adapter.method or {}).get('name')} adapter"
    message = f"Push the {what} with Trimtab {__version__}"
    return hub_client.upload(
        new, arguments.name, private=arguments.private, branch=arguments.revision, message=message, version=__version__,
        remove=replaced_files(there, names),
    )  # fmt: skip


def _report(console: Any, arguments: argparse.Namespace, names: list[str], address: str) -> None:
    from rich.markup import escape

    place = arguments.output if arguments.output is not None else arguments.name
    console.print(
        f"{'Written to' if arguments.output is not None else 'Pushed to'} {escape(str(place))}: {escape(', '.join(names))}"
    )
    if address:
        console.print(f"Commit:   {escape(address)}")
        at = f"@{arguments.revision}" if arguments.revision else ""
        console.print(f"Use it:   trimtab chat {escape(arguments.name + at)}")
    else:
        console.print(f"Push it:  hf upload {escape(arguments.name)} {escape(str(place))} .")
