"""The folder that is published of a run or an adapter: what others need to use it and to know what it is, and nothing else.

Names of folders of this machine, examples' texts and secrets stay here: paths keep their last part, the certificate leaves out its
rows, and a text in which any of these is found all the same is refused.
"""

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trimtab.artifacts import Adapter, is_run, read_adapter, read_certificate, read_record, write_adapter
from trimtab.artifacts.adapter import CONFIG, FORMAT, HUB_WEIGHTS, KEYS, MANIFEST, PEFT_WEIGHTS, TEMPLATE, TEMPLATES
from trimtab.artifacts.run_folder import CERTIFICATE, DATA, RECIPE
from trimtab.base.locate import EMBEDDED
from trimtab.core import files, yaml12
from trimtab.core.errors import ArtifactError, RecipeError, listing
from trimtab.deploy import privacy
from trimtab.deploy.base_facts import CARD, BaseFacts
from trimtab.deploy.provenance import base_model_keys

_TEXTS = {".json", ".md", ".yaml", ".jinja", ".txt"}
_LARGEST_TEXT = 2_000_000
"""Bytes above which a text is a vocabulary."""
_UNPUBLISHED = ("canaries", "answers", "digest", "format")
"""Of a certificate: rows of the examples, and answers to them."""


_EMPTY = hashlib.sha256(str(None).encode()).hexdigest()
"""Of a template that is not there."""


@dataclass
class Publication:
    """What is known about what is published."""

    name: str
    """On the hub, without a revision."""
    base: BaseFacts
    adapter: Adapter
    """As it is published."""
    merged: bool
    recipe: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    certificate: dict[str, Any] = field(default_factory=dict)
    tokenizer: bool = False
    """A tokenizer is beside it."""
    branch: str | None = None
    """Of the repository, if it is not the main one."""

    @property
    def base_name(self) -> str | None:
        """What others load the base model by; None if only its own folder is known."""
        return self.base.hub_name

    @property
    def has_template(self) -> bool:
        """Prompts are written by a chat template."""
        return self.adapter.base["fingerprint"].get("template", _EMPTY) != _EMPTY

    @property
    def for_adapterhub(self) -> bool:
        return self.adapter.weights == HUB_WEIGHTS

    @property
    def for_peft(self) -> bool:
        return not self.for_adapterhub and not str(self.adapter.config.get("peft_type", "TRIMTAB")).startswith("TRIMTAB")


def publication(folder: Path, name: str, base: BaseFacts, *, merged: bool) -> Publication:
    """What is published of an adapter folder, its run's facts included if it is a run's. Raises ArtifactError."""
    stored = read_adapter(folder)
    if stored.method is None:
        raise ArtifactError(
            f"{folder}: has no manifest of Trimtab ({MANIFEST}), so there is nothing to say about it: push it with `hf upload`."
        )
    known = _known_name(stored.source, base)
    config = {key: value for key, value in stored.config.items() if key != "revision"}
    if "base_model_name_or_path" in config:
        config |= base_model_keys(
            f"{base.hub_name}@{base.revision}" if base.hub_name and base.revision else base.hub_name or known
        )
    if "model_name" in config:
        config["model_name"] = base.hub_name or known
    model = {**stored.base["model"], "name": known}
    about = {**stored.base, "model": privacy.without_folders(model) | {"name": known}}
    adapter = replace(stored, config=config, base=about, trained=privacy.without_folders(stored.trained))
    run = next((parent for parent in (folder.parent, folder.parent.parent) if is_run(parent)), None)
    if run is None:
        return Publication(name, base, adapter, merged)
    recipe = privacy.without_folders(yaml12.load((run / RECIPE).read_text(encoding="utf-8"), str(run / RECIPE), lines=False))
    recipe["model"]["name"] = known
    for key in ("output", "track"):  # whose names are its user's
        recipe.pop(key, None)
    certificate = {}
    if (run / CERTIFICATE).is_file():
        whole = privacy.without_folders(read_certificate(run))
        certificate = {key: value for key, value in whole.items() if key not in _UNPUBLISHED}
        certificate["original"] = files.sha256_file(run / CERTIFICATE)
    data = files.read_json(run / DATA)
    return Publication(name, base, adapter, merged, recipe, read_record(run), data, certificate)


def _known_name(source: str, base: BaseFacts) -> str:
    """By which others' Trimtab finds the base model: the embedded one's own name, one on the hub, or the folder's last part."""
    if source == EMBEDDED:
        return source
    if base.hub_name:
        return f"{base.hub_name}@{base.revision}" if base.revision else base.hub_name
    return str(privacy.without_folders(source))


def write_publication(new: Path, folder: Path, about: Publication, write_card: Callable[[Publication], str]) -> list[str]:
    """Fill a folder (with the merged model in it already, if that is published) with what is published; returned are its files' names.

    Args:
        folder: The adapter's.

    Raises:
        RecipeError: A text in it would give away what must not leave this machine.
    """
    if not about.merged:
        write_adapter(new, about.adapter, overwrite=True, write_more=lambda place: _copy_tokenizer(folder, place))
    about.tokenizer = (new / "tokenizer_config.json").is_file()
    if about.recipe:
        files.write_text(new / RECIPE, yaml12.dump(about.recipe))
    if about.certificate:
        files.write_json(new / CERTIFICATE, about.certificate)
    files.write_text(new / CARD, write_card(about))
    refuse_leaks(new, folder)
    return sorted(file.relative_to(new).as_posix() for file in new.rglob("*") if file.is_file())


_OURS = re.compile(
    r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|(adapter|adapter_model)\.safetensors|\w+\.jinja"
)
"""Weights and templates, which act where they are, whoever has put them there."""

_TOKENIZERS = re.compile(r"[\w.-]+|additional_chat_templates/[\w-]+\.jinja")


def replaced_files(there: Iterable[str], names: Iterable[str]) -> list[str]:
    """The files of an earlier push to the same place that would be read with the files of this one, or instead of them."""
    return sorted({name for name in there if _OURS.fullmatch(name)}.difference(names))


def _copy_tokenizer(folder: Path, place: Path) -> None:
    """Copy the other files that an adapter's manifest lists, if they are where a tokenizer has its own."""
    for name in files.read_manifest(folder / MANIFEST, FORMAT, KEYS)["files"]:
        if name not in (CONFIG, PEFT_WEIGHTS, HUB_WEIGHTS, TEMPLATE, TEMPLATES) and _TOKENIZERS.fullmatch(name):
            files.write_bytes(place / name, (folder / name).read_bytes())


def refuse_leaks(new: Path, source: Path) -> None:
    """Raise RecipeError for a secret, or a path of this machine, in a text of the folder."""
    own = tuple(parent for parent in (source.absolute(), *source.absolute().parents) if len(parent.parts) > 2)
    problems = []
    for file in sorted(new.rglob("*")):
        if file.suffix in _TEXTS and file.stat().st_size < _LARGEST_TEXT:
            text = file.read_text(encoding="utf-8", errors="replace").replace(str(new), "")
            problems += [f"{file.relative_to(new)} would hold {what}" for what in privacy.leaks(text, own)]
    if problems:
        raise RecipeError(
            f"Nothing is published, because it would say more than it should:\n{listing(problems)}\nTake it out of the recipe (the run's "
            f"{RECIPE} shows where it stands), and train again."
        )
