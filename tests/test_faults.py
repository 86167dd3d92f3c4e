"""Damage of every kind to what a run leaves, and to what it goes on from: all of it is noticed, and said by a file's name."""

import json
import random
import shutil
from pathlib import Path

import pytest
from worlds import WHOLE

from trimtab import cli
from trimtab.artifacts import read_adapter, read_state, run_status, saved_states
from trimtab.artifacts.run_folder import REPORT
from trimtab.certify.certificate import verify_files
from trimtab.core import files
from trimtab.core.errors import ArtifactError

pytestmark = pytest.mark.usefixtures("one_thread")

FLIPS, DAMAGES = (10_000, 1_000) if WHOLE else (2_000, 400)


@pytest.fixture(scope="module")
def made(world, tmp_path_factory):
    """A finished run with its certificate, and one that was ended on its way."""
    from trimtab.report import RunObserver
    from trimtab.run.recipe import Recipe
    from trimtab.run.script import run_recipe

    place = tmp_path_factory.mktemp("faults") / "world"
    shutil.copytree(world, place)

    class Ends(RunObserver):
        def logged(self, kind, step, values):
            if (kind, step) == ("train", 7):
                raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert cli.main(["train", "r.yaml", "certify=true", "train.epochs=4", "output=done"]) == 0
        with pytest.raises(KeyboardInterrupt):
            run_recipe(Recipe.read(Path("r.yaml"), ["output=cut", "train.evaluate_every=5"]), Ends())
    return place


def looked_at(folder, path=None):
    """What is looked at before this folder is used; of an unfinished run, before that part is used in which the path is."""
    if folder.name == "done":
        verify_files(folder)
        return
    parts = [*saved_states(folder / "states"), *sorted((folder / "checkpoints").iterdir())]
    for part in parts:
        if path is None or part in path.parents:
            read_state(part) if part.parent.name == "states" else read_adapter(part, ours=True)


@pytest.mark.parametrize("name", ["done", "cut"])
def test_flipped_bits_are_noticed(made, name):
    folder, draw, missed = made / name, random.Random(name), []
    looked_at(folder)
    inside = [folder] if name == "done" else [folder / "states", folder / "checkpoints"]
    paths = [path for place in inside for path in sorted(place.rglob("*")) if path.is_file() and path.name != REPORT]
    assert len(paths) >= 10
    for _ in range(FLIPS // 5 if name == "done" else FLIPS * 4 // 5):
        path = draw.choice(paths)
        content = path.read_bytes()
        at, bit = draw.randrange(len(content)), draw.randrange(8)
        path.write_bytes(content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :])
        try:
            looked_at(folder, path)
            missed.append((path.name, at, bit))
        except ArtifactError as error:
            if not any(part in str(error) for part in (path.name, path.parent.name)):
                missed.append((path.name, str(error)))
        finally:
            path.write_bytes(content)
    assert missed == []
    looked_at(folder)


def damaged(path, others, draw):
    """One structural damage to a file; what to call it."""
    content, kind = (
        path.read_bytes(),
        draw.choice(["cut", "emptied", "gone", "longer", "another's", "turned", "twice", "zeros"]),
    )
    start, end = sorted(draw.sample(range(len(content) + 1), 2))
    changed = {
        "cut": content[:start],
        "emptied": b"",
        "longer": content + draw.randbytes(1 + start),
        "another's": draw.choice(others).read_bytes(),
        "turned": content[:start] + content[start:end][::-1] + content[end:],
        "twice": content[:end] + content[start:],
        "zeros": content[:start] + bytes(end - start) + content[end:],
        "gone": None,
    }[kind]
    if changed is None:
        path.unlink()
    else:
        path.write_bytes(changed)
    return kind, changed != content


@pytest.mark.parametrize("name", ["done", "cut"])
def test_structural_damages_are_noticed(made, name):
    folder, draw, missed, kinds = made / name, random.Random(name), [], set()
    inside = [folder] if name == "done" else [folder / "states", folder / "checkpoints"]
    paths = [path for place in inside for path in sorted(place.rglob("*")) if path.is_file() and path.name != REPORT]
    for _ in range(DAMAGES // 2):
        path = draw.choice(paths)
        content = path.read_bytes()
        kind, is_damage = damaged(path, [p for p in paths if p != path], draw)
        kinds.add(kind)
        try:
            looked_at(folder, path)
            missed += [(path.name, kind)] if is_damage else []
        except ArtifactError:
            pass
        finally:
            path.write_bytes(content)
    assert missed == []
    assert len(kinds) == 8


def test_a_reader_that_does_not_look_is_noticed(made, monkeypatch):
    """The negative control: tensors are whatever the manifest says."""

    def trusting(path):
        return json.loads((path.parent / "state.json").read_text())["tensors"]

    monkeypatch.setattr(files, "sha256_file", trusting)
    folder = made / "cut" / "states"
    path = next(folder.rglob("*.safetensors"))
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        read_state(path.parent)
    finally:
        path.write_bytes(content)


def test_an_edited_certificate_certifies_nothing(made, tmp_path):
    """What `merge` asks before it takes an adapter reads the certificate's digest, too."""
    run = tmp_path / "run"
    shutil.copytree(made / "done", run)
    assert run_status(run).tests
    path = run / "certificate.json"
    path.write_text(path.read_text().replace('"passed": ', '"passed":  ', 1))
    with pytest.raises(ArtifactError, match="changed since it was saved"):
        run_status(run)
