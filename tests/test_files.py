"""Whatever write fails, and wherever a program dies: the old content, or the new, or nothing; and a message that names it."""

import errno
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import textwrap
from types import ModuleType
from unittest.mock import Mock

import pytest
import torch
from disks import make_read_only, small_disk
from safetensors.torch import save_file

from trimtab.artifacts import Adapter, read_adapter, write_adapter
from trimtab.core import cache, files, locks
from trimtab.core.errors import ArtifactError, StorageError

OLD, NEW = b"old content", b"new content " * 400
NOT_WRITTEN = {errno.ENOSPC: "No space left on device", errno.EIO: "Input/output error", errno.EACCES: "Permission denied"}
CALLS = ("open", "fsync", "replace", "rename", "mkdir", "chmod", "rmdir", "unlink")
"""The system calls by which files.py changes the disk; those of an open file are `write`, `flush` and `close`."""


class Faults:
    """Makes the n-th system call fail, once or from then on."""

    def __init__(self, monkeypatch, number, code, *, for_good=False):
        self.made, self.number, self.code, self.for_good = [], number, code, for_good
        for name in CALLS:
            monkeypatch.setattr(os, name, self.failing(getattr(os, name), name))
        monkeypatch.setattr(files, "open", self.open, raising=False)

    def failing(self, call, name):
        def called(*args, **kwargs):
            self.made.append(name)
            if len(self.made) == self.number or (self.for_good and len(self.made) > self.number):
                raise OSError(self.code, os.strerror(self.code), args[0] if args and not isinstance(args[0], int) else None)
            return call(*args, **kwargs)

        return called

    def open(self, *args, **kwargs):
        file = self.failing(open, "open()")(*args, **kwargs)
        return File(file, self) if "b" in args[1] and args[1] != "rb" else file

    @property
    def happened(self):
        return len(self.made) >= self.number


class File:
    """An open file whose writes can fail, half-way."""

    def __init__(self, file, faults):
        self._file, self._faults = file, faults

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def write(self, content):
        try:
            return self._faults.failing(self._file.write, "write")(content)
        except OSError:
            self._file.write(content[: len(content) // 2])
            raise

    def flush(self):
        self._faults.failing(self._file.flush, "flush")()

    def fileno(self):
        return self._file.fileno()


def every_fault(monkeypatch, code, do, failed, done, *, for_good=False, start=lambda: None):
    """`do` with its 1st, 2nd, 3rd, … system call failing, then `failed` or `done`, until none fails; the calls it makes."""
    for number in range(1, 200):
        start()
        with monkeypatch.context() as patch:
            faults = Faults(patch, number, code, for_good=for_good)
            try:
                do()
                failure = None
            except Exception as error:
                failure = error
        if failure is None:
            done()
        else:
            failed(failure, faults)
        if not faults.happened:
            assert failure is None
            return faults.made
    raise AssertionError("it never came through")


def assert_says(failure, code, path):
    """One of the errors a user can cause, which names what was to be written and the reason, and no temporary name."""
    assert type(failure) is StorageError, repr(failure)
    assert failure.exit_code == 6
    assert str(failure).startswith(f"{path}: cannot write: {NOT_WRITTEN[code]}.")
    assert files.TEMPORARY not in str(failure)


def results(folder):
    """What a reader sees, temporary files not among it: path -> content."""
    seen = {}
    for path in sorted(folder.rglob("*")):
        if not any(part.startswith(files.TEMPORARY) for part in path.relative_to(folder).parts):
            seen[str(path.relative_to(folder))] = path.read_bytes() if path.is_file() else None
    return seen


def temporaries(folder):
    return [path.name for path in folder.rglob(f"{files.TEMPORARY}*")]


@pytest.fixture(params=NOT_WRITTEN, ids=lambda code: errno.errorcode[code])
def code(request):
    return request.param


@pytest.mark.parametrize("for_good", [False, True])
def test_a_file_is_replaced_whole_or_not_at_all_whichever_call_fails(code, for_good, tmp_path, monkeypatch):
    path = tmp_path / "file.json"

    def start():
        path.write_bytes(OLD)

    def failed(failure, faults):
        assert_says(failure, code, path)
        replaced = faults.made[: faults.number - 1].count("replace")
        assert results(tmp_path) == {"file.json": NEW if replaced else OLD}
        if not for_good:
            assert temporaries(tmp_path) == []
        for leftover in temporaries(tmp_path):
            (tmp_path / leftover).unlink()

    def done():
        assert results(tmp_path) == {"file.json": NEW}
        assert temporaries(tmp_path) == []

    made = every_fault(monkeypatch, code, lambda: files.write_bytes(path, NEW), failed, done, for_good=for_good, start=start)
    assert made == ["mkdir", "open()", "write", "flush", "fsync", "replace", "open", "fsync"]


def test_a_new_file_in_a_new_folder_is_there_whole_or_not_at_all(code, tmp_path, monkeypatch):
    path = tmp_path / "deep" / "er" / "file.json"

    def start():
        shutil.rmtree(tmp_path / "deep", ignore_errors=True)

    def failed(failure, faults):
        assert_says(failure, code, path)
        assert results(tmp_path).get("deep/er/file.json", NEW) == NEW
        assert temporaries(tmp_path) == []

    def done():
        assert path.read_bytes() == NEW

    every_fault(monkeypatch, code, lambda: files.write_bytes(path, NEW), failed, done, start=start)


@pytest.mark.parametrize("for_good", [False, True])
def test_a_folder_appears_whole_or_not_at_all_whichever_call_fails(code, for_good, tmp_path, monkeypatch):
    path, whole = (
        tmp_path / "folder",
        {"folder": None, "folder/a.json": b'{\n  "a": 1\n}\n', "folder/b": b"b", "folder/in": None, "folder/in/c": b"c"},
    )

    def start():
        shutil.rmtree(path, ignore_errors=True)

    def fill():
        with files.new_folder(path) as new:
            assert new.parent == tmp_path  # so that a rename within one disk finishes it
            files.write_json(new / "a.json", {"a": 1})
            files.write_bytes(new / "b", b"b")
            files.write_bytes(new / "in" / "c", b"c")

    def failed(failure, faults):
        assert type(failure) is StorageError, repr(failure)
        assert str(failure).startswith(str(path))
        assert f": cannot write: {NOT_WRITTEN[code]}." in str(failure)
        assert files.TEMPORARY not in str(failure)
        renamed = "rename" in faults.made[: faults.number - 1]
        assert results(tmp_path) == (whole if renamed else {})
        if not for_good:
            assert temporaries(tmp_path) == []
        for leftover in temporaries(tmp_path):
            shutil.rmtree(tmp_path / leftover, ignore_errors=True)

    def done():
        assert results(tmp_path) == whole
        assert temporaries(tmp_path) == []

    made = every_fault(monkeypatch, code, fill, failed, done, for_good=for_good, start=start)
    assert made.index("rename") > max(n for n, call in enumerate(made) if call == "write")
    assert made[made.index("rename") :] == ["rename", "open", "fsync"]
    # Each file and its folder as it is written; at the end each file again, as a library may have written it, and the folder.
    assert made[: made.index("rename")].count("fsync") == 3 * 2 + 3 + 1


def test_a_folder_that_failed_can_be_written_again(tmp_path, monkeypatch):
    def fill():
        with files.new_folder(tmp_path / "folder") as new:
            files.write_bytes(new / "a", NEW)

    with monkeypatch.context() as patch:
        Faults(patch, 5, errno.ENOSPC)
        with pytest.raises(StorageError):
            fill()
    fill()
    assert results(tmp_path) == {"folder": None, "folder/a": NEW}


@pytest.mark.parametrize("raised", [KeyboardInterrupt, ZeroDivisionError, SystemExit])
def test_a_folder_whose_filling_is_broken_off_leaves_nothing(raised, tmp_path):
    def fill():
        with files.new_folder(tmp_path / "folder") as new:
            files.write_bytes(new / "a", NEW)
            raise raised

    with pytest.raises(raised):
        fill()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("there", ["a folder", "an empty folder", "a file", "a link to nowhere"])
def test_nothing_that_exists_is_overwritten_by_a_folder(there, tmp_path):
    path = tmp_path / "folder"
    if there == "a file":
        path.write_bytes(OLD)
    elif there == "a link to nowhere":
        path.symlink_to("nowhere")
    else:
        path.mkdir()
        if there == "a folder":
            (path / "a").write_bytes(OLD)
    before = results(tmp_path)
    with pytest.raises(StorageError) as caught, files.new_folder(path):
        raise AssertionError("the block was entered")
    assert str(caught.value) == f"{path}: exists already, and is not overwritten. Give another name, or remove it first."
    assert results(tmp_path) == before


def test_an_updated_folder_keeps_what_is_there_and_its_folders_can_be_entered(tmp_path):
    path = tmp_path / "folder"
    (path / "in").mkdir(parents=True)
    (path / "in" / "old").write_bytes(OLD)
    with files.updated_folder(path, last="list") as new:
        for name in ("list", "in/a", "deep/er/b"):
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            (new / name).write_bytes(b"new")
    assert {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()} == {
        "list",
        "in/old",
        "in/a",
        "deep/er/b",
    }
    assert all(folder.stat().st_mode & 0o111 == 0o111 for folder in (path / "in", path / "deep", path / "deep" / "er"))


def test_a_folder_has_the_permissions_that_the_user_asked_of_new_ones(tmp_path):
    mask = os.umask(0o027)
    try:
        with files.new_folder(tmp_path / "folder") as new:
            assert new.stat().st_mode & 0o777 == 0o700
        assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o750
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(mask)


@pytest.mark.parametrize("for_good", [False, True])
def test_a_folder_is_removed_from_sight_at_once_or_stays_whole(code, for_good, tmp_path, monkeypatch):
    path, whole = tmp_path / "folder", {"folder": None, "folder/a": b"a", "folder/b": b"b"}

    def start():
        for leftover in temporaries(tmp_path):
            shutil.rmtree(tmp_path / leftover, ignore_errors=True)
        path.mkdir(exist_ok=True)
        for name in "ab":
            (path / name).write_bytes(name.encode())

    def failed(failure, faults):
        assert type(failure) is StorageError, repr(failure)
        assert str(failure).startswith(f"{path}: cannot write: {NOT_WRITTEN[code]}.")
        assert results(tmp_path) == ({} if "rename" in faults.made[: faults.number - 1] else whole)

    def done():
        assert results(tmp_path) == {}
        assert temporaries(tmp_path) == []

    made = every_fault(monkeypatch, code, lambda: files.remove_folder(path), failed, done, for_good=for_good, start=start)
    assert made[0] == "rename"
    assert len(made) >= 4


ADAPTER = Adapter(
    config={"peft_type": "LORA", "r": 2},
    tensors={"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)},
    method={"name": "lora", "rank": 2},
    base={"model": {"name": "somewhere"}, "fingerprint": {"weights": "1"}, "stop_ids": [2]},
    trained={"step": 3},
    versions={"trimtab": "0"},
)


def assert_same_adapter(one, other):
    assert {**vars(one), "tensors": None} == {**vars(other), "tensors": None}
    assert one.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())


@pytest.mark.parametrize("for_good", [False, True])
def test_an_adapter_is_saved_whole_or_not_at_all_whichever_call_fails(code, for_good, tmp_path, monkeypatch):
    path = tmp_path / "adapter"

    def start():
        shutil.rmtree(path, ignore_errors=True)

    def failed(failure, faults):
        assert type(failure) is StorageError, repr(failure)
        assert str(failure).startswith(str(path))
        assert files.TEMPORARY not in str(failure)
        if path.exists():
            assert_same_adapter(read_adapter(path), ADAPTER)
        if not for_good:
            assert temporaries(tmp_path) == []
        for leftover in temporaries(tmp_path):
            shutil.rmtree(tmp_path / leftover, ignore_errors=True)

    def done():
        assert_same_adapter(read_adapter(path), ADAPTER)
        assert sorted(file.name for file in path.iterdir()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
            "trimtab.json",
        ]

    every_fault(monkeypatch, code, lambda: write_adapter(path, ADAPTER), failed, done, for_good=for_good, start=start)


@pytest.mark.parametrize("what", ["write_bytes", "new_folder", "remove_folder"])
def test_a_program_that_dies_at_any_call_leaves_the_old_or_the_new(what, tmp_path):
    """Without a word of clean-up: the process ends within the call."""
    program = textwrap.dedent(
        """
        import os, sys
        from pathlib import Path
        from trimtab.core import files, locks

        folder, number, calls = Path(sys.argv[1]), int(sys.argv[2]), 0

        def dying(call):
            def called(*args, **kwargs):
                global calls
                calls += 1
                if calls == number:
                    os._exit(9)
                return call(*args, **kwargs)
            return called

        for name in ("open", "fsync", "replace", "rename", "mkdir", "chmod", "rmdir", "unlink"):
            setattr(os, name, dying(getattr(os, name)))
        files.open = dying(open)
        if sys.argv[3] == "write_bytes":
            files.write_bytes(folder / "it", b"new")
        elif sys.argv[3] == "new_folder":
            with files.new_folder(folder / "it") as new:
                files.write_bytes(new / "a", b"new")
        else:
            files.remove_folder(folder / "it")
        """
    )
    allowed = {
        "write_bytes": [{"it": b"old"}, {"it": b"new"}],
        "new_folder": [{}, {"it": None, "it/a": b"new"}],
        "remove_folder": [{"it": None, "it/a": b"old"}, {}],
    }[what]
    seen = []
    for number in range(1, 50):
        folder = tmp_path / str(number)
        folder.mkdir()
        if what == "write_bytes":
            (folder / "it").write_bytes(b"old")
        elif what == "remove_folder":
            (folder / "it").mkdir()
            (folder / "it" / "a").write_bytes(b"old")
        done = subprocess.run([sys.executable, "-c", program, str(folder), str(number), what], capture_output=True, text=True)
        seen.append(results(folder))
        if done.returncode == 0:
            break
        assert done.returncode == 9, done.stderr
    assert number > 3
    assert all(one in allowed for one in seen)
    assert seen[-1] == allowed[1]


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        yield disk


def test_a_disk_that_is_really_full_leaves_the_old_and_says_how_much_is_free(disk):
    path = disk / "file"
    files.write_bytes(path, OLD)
    with pytest.raises(StorageError) as caught:
        files.write_bytes(path, bytes(300_000))
    assert str(caught.value) == (
        f"{path}: cannot write: No space left on device. 0.3 MB are free there: free some, or choose another folder."
    )
    with (
        pytest.raises(StorageError, match=r"folder/a: cannot write: No space left on device\. 0\.3 MB are free there"),
        files.new_folder(disk / "folder") as new,
    ):
        files.write_bytes(new / "a", bytes(300_000))
    assert results(disk) == {"file": OLD}
    assert temporaries(disk) == []


def test_an_adapter_too_large_for_a_real_disk_leaves_nothing(disk):
    """Its tensors are written by safetensors, whose error is not the system's."""
    tensors = {"a": torch.zeros(100_000)}
    with pytest.raises(StorageError) as caught:
        write_adapter(disk / "adapter", Adapter({"peft_type": "LORA"}, tensors))
    assert str(caught.value) == (
        f"{disk}/adapter: cannot write: Error while serializing: I/O error: No space left on device (os error 28). "
        "0.3 MB are free there: free some, or choose another folder."
    )
    assert list(disk.iterdir()) == []


def test_a_log_on_a_real_full_disk_says_so(disk):
    path = disk / "metrics.jsonl"
    files.append_line(path, "{}")
    with pytest.raises(StorageError, match=r"metrics\.jsonl: cannot write: No space left on device"):
        files.append_line(path, "x" * 300_000)
    assert path.read_bytes().startswith(b"{}\n")


def test_a_disk_that_is_really_read_only_says_so(disk):
    make_read_only(disk)
    for write in (lambda: files.write_bytes(disk / "x", NEW), lambda: files.append_line(disk / "x", "line")):
        with pytest.raises(StorageError) as caught:
            write()
        assert str(caught.value) == f"{disk}/x: cannot write: Read-only file system. Choose a folder that you may write to."
    with pytest.raises(StorageError, match="Read-only file system"), files.new_folder(disk / "x"):
        raise AssertionError("the block was entered")


def test_a_file_that_grows_too_large_for_the_process_leaves_the_old(tmp_path):
    """A real failure of write() that needs no root: the limit on the size of a file."""
    (tmp_path / "file").write_bytes(OLD)
    program = textwrap.dedent(
        """
        import resource, sys
        from pathlib import Path
        from trimtab.core import errors, files

        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        for write in (lambda p: files.write_bytes(p, bytes(5000)), lambda p: files.append_line(p, "x" * 5000)):
            try:
                write(Path(sys.argv[1]))
            except errors.StorageError as error:
                print(error)
        """
    )
    path = tmp_path / "file"
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all(line.startswith(f"{path}: cannot write: File too large. ") for line in lines)
    assert path.read_bytes().startswith(OLD)
    assert temporaries(tmp_path) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 1000


def test_a_file_where_a_folder_is_needed_is_named(tmp_path):
    (tmp_path / "file").write_bytes(OLD)
    for path in (tmp_path / "file" / "a", tmp_path / "file" / "a" / "b"):
        with pytest.raises(StorageError) as caught:
            files.write_bytes(path, NEW)
        assert str(caught.value).startswith(f"{path}: cannot write: ")
        assert str(caught.value).endswith(f" {tmp_path / 'file'} is a file, not a folder.")


DAMAGED = "The file is damaged; restore it from a copy."


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "missing."),
        (b"", f"not valid JSON (Expecting value: line 1 column 1 (char 0)). {DAMAGED}"),
        (b'{"a": 1', f"not valid JSON (Expecting ',' delimiter: line 1 column 8 (char 7)). {DAMAGED}"),
        (b'{"a": "\xff"}', f"not valid JSON ('utf-8' codec can't decode byte 0xff in position 7: invalid start byte). {DAMAGED}"),
        (b"[" * 100_000,
         f"not valid JSON (maximum recursion depth exceeded while decoding a JSON array from a unicode string). {DAMAGED}"),
    ],
)  # fmt: skip
def test_damaged_json_is_refused_with_the_place(content, reason, tmp_path):
    path = tmp_path / "run.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ArtifactError) as caught:
        files.read_json(path)
    assert str(caught.value) == f"{path}: {reason}"
    assert caught.value.exit_code == 4


def test_a_folder_instead_of_json_is_refused(tmp_path):
    with pytest.raises(ArtifactError) as caught:
        files.read_json(tmp_path)
    assert str(caught.value) == f"{tmp_path}: cannot be read: Is a directory."


def test_json_is_written_as_it_is_read_and_never_with_a_number_that_is_not_json(tmp_path):
    value = {"a": [1, 2.5, None, True], "ä": "…\u2028", "": {}}
    files.write_json(tmp_path / "a.json", value)
    assert files.read_json(tmp_path / "a.json") == value
    with pytest.raises(ValueError, match="Out of range float values are not JSON compliant"):
        files.write_json(tmp_path / "a.json", float("nan"))
    assert files.read_json(tmp_path / "a.json") == value


@pytest.mark.parametrize("cut", range(3))
def test_every_prefix_of_a_json_file_is_refused(cut, tmp_path):
    text = json.dumps({"a": {"b": [1, "x"]}}, indent=cut)
    for length in range(len(text)):
        (tmp_path / "a.json").write_text(text[:length])
        with pytest.raises(ArtifactError, match="not valid JSON"):
            files.read_json(tmp_path / "a.json")


def test_every_flipped_bit_of_an_adapter_is_noticed_its_manifest_among_it(tmp_path):
    write_adapter(tmp_path / "adapter", ADAPTER)
    for path in sorted((tmp_path / "adapter").iterdir()):
        content = path.read_bytes()
        for at in range(len(content)):
            path.write_bytes(content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :])
            with pytest.raises(ArtifactError):
                read_adapter(tmp_path / "adapter")
        path.write_bytes(content)
    assert_same_adapter(read_adapter(tmp_path / "adapter"), ADAPTER)


@pytest.mark.parametrize("value", [None, 3, "x", [], {}, [1], {"x": 1}], ids=str)
@pytest.mark.parametrize("key", ["format", "method", "files", "tensors", "base", "trained", "versions"])
def test_a_manifest_that_was_edited_is_refused(key, value, tmp_path):
    write_adapter(tmp_path / "adapter", ADAPTER)
    manifest = files.read_json(tmp_path / "adapter" / "trimtab.json")
    for edited in (
        {**manifest, key: value},
        {k: v for k, v in manifest.items() if k != key},
        {**manifest, "more": value},
        value,
    ):
        files.write_json(tmp_path / "adapter" / "trimtab.json", edited)
        with pytest.raises(ArtifactError, match=r"trimtab\.json"):
            read_adapter(tmp_path / "adapter")


def test_a_hash_of_code_is_of_all_that_computes_and_of_nothing_else(tmp_path):
    (tmp_path / "engine" / "backends" / "c").mkdir(parents=True)
    (tmp_path / "data").mkdir()
    engine, hook = ModuleType("engine"), ModuleType("hook")
    engine.__file__, engine.__path__, hook.__file__ = str(tmp_path / "engine" / "__init__.py"), [], str(tmp_path / "hook.py")
    found = set()
    for name, text in (
        ("engine/loop.py", "1"), ("engine/loop.py", "2"), ("engine/backends/c/kernels.h", "1"), ("hook.py", "1"), ("engine/moved.py", "2"),
    ):  # fmt: skip
        (tmp_path / name).write_text(text)
        if name != "hook.py":
            found.add(cache.code_hash.__wrapped__(engine))
        else:
            found.add(cache.code_hash.__wrapped__(engine, hook))
    assert len(found) == 5
    (tmp_path / "data" / "read.py").write_text("1")
    (tmp_path / "engine" / "loop.pyc").write_text("1")
    assert cache.code_hash.__wrapped__(engine) in found


def test_where_there_are_no_locks_one_goes_without(tmp_path, monkeypatch):
    with (
        locks.file_lock(tmp_path / "lock"),
        pytest.raises(StorageError, match=rf"another process \({os.getpid()} on .+\) is training there"),
        locks.file_lock(tmp_path / "lock"),
    ):
        pass
    for without in (
        Mock(flock=Mock(side_effect=OSError(errno.ENOLCK, "no locks")), LOCK_EX=1, LOCK_NB=2),
        None,
    ):
        monkeypatch.setattr(locks, "fcntl", without)
        with locks.file_lock(tmp_path / "lock"), locks.file_lock(tmp_path / "lock"):
            pass


def test_a_lock_that_was_taken_away_before_it_was_had_is_none(tmp_path, monkeypatch):
    """Between opening and locking: whoever had it has removed it, with its folder even, and a third process may have made another."""
    path, flock = tmp_path / "run" / "lock", locks.fcntl.flock
    for left in ("nothing", "another"):
        calls = []

        def slow(file, how, left=left, calls=calls):
            calls.append(1)
            if len(calls) == 1:
                shutil.rmtree(tmp_path / "run")
                if left == "another":
                    path.parent.mkdir()
                    path.write_bytes(b"")
            flock(file, how)

        monkeypatch.setattr(locks.fcntl, "flock", slow)
        with locks.file_lock(path) as held:
            assert (held, len(calls)) == (True, 2)
            assert path.read_text().startswith(f"{os.getpid()} on ")
            with pytest.raises(StorageError), locks.file_lock(path):
                pass


@pytest.mark.parametrize("content", ['{"a": NaN}\n', '{"a": "\\ud800"}\n', '{"a":1}\n', "[]\n"])
def test_a_manifest_is_what_was_written_to_the_last_byte(content, tmp_path):
    (tmp_path / "m.json").write_text(content)
    with pytest.raises(ArtifactError, match="not an object" if content == "[]\n" else "changed since it was saved"):
        files.read_manifest(tmp_path / "m.json", 1, {"a"})
    files.write_manifest(tmp_path / "m.json", 1, {"a": "é"})
    assert files.read_manifest(tmp_path / "m.json", 1, {"a"}) == files.read_json(tmp_path / "m.json")
    assert files.read_json(tmp_path / "m.json")["a"] == "é"
    for form, keys in ((2, {"a"}), (1, {"a", "b"}), (1, set())):
        with pytest.raises(ArtifactError, match="written by another version of Trimtab"):
            files.read_manifest(tmp_path / "m.json", form, keys)


def test_a_digest_does_not_depend_on_the_order_of_keys():
    assert files.json_digest({"a": 1, "b": [2, {"c": 3, "d": 4}]}) == files.json_digest({"b": [2, {"d": 4, "c": 3}], "a": 1})
    assert files.json_digest({"a": [1, 2]}) != files.json_digest({"a": [2, 1]})


def test_a_manifest_without_a_digest_or_with_anothers_is_refused(tmp_path):
    files.write_json(tmp_path / "m.json", {"format": 1, "a": 1})
    with pytest.raises(ArtifactError, match="changed since it was saved"):
        files.read_manifest(tmp_path / "m.json", 1, {"a"})
    files.write_json(tmp_path / "m.json", {"format": 1, "a": 1, "digest": files.json_digest({"format": 1, "a": 2})})
    with pytest.raises(ArtifactError, match="changed since it was saved"):
        files.read_manifest(tmp_path / "m.json", 1, {"a"})


def test_a_disk_that_does_not_say_how_full_it_is_is_full_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", Mock(side_effect=OSError(errno.EIO, "no")))
    with (
        pytest.raises(StorageError, match=r"No space left on device\. Free some, or choose another folder\."),
        files.storage_errors(tmp_path / "x"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_is_no_adapter_folder_says_so(tmp_path):
    with pytest.raises(ArtifactError, match="no such adapter folder"):
        read_adapter(tmp_path / "none")
    for config in ([], "x", None, 3, {}, {"version": "1.2"}, ["peft_type"]):
        files.write_json(tmp_path / "a" / "adapter_config.json", config)
        with pytest.raises(ArtifactError, match="is not a PEFT adapter configuration"):
            read_adapter(tmp_path / "a")
    files.write_json(tmp_path / "a" / "adapter_config.json", {"version": "adapters.1.2"})
    save_file({"x": torch.ones(1)}, tmp_path / "a" / "adapter.safetensors")
    assert read_adapter(tmp_path / "a").method is None
    files.write_json(tmp_path / "a" / "head_config.json", {})
    with pytest.raises(ArtifactError, match="holds a head beside the adapter"):
        read_adapter(tmp_path / "a")


def test_a_cache_that_cannot_be_written_names_the_way_out(tmp_path, monkeypatch):
    (tmp_path / "blocked").write_text("a file")
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "blocked"))
    with pytest.raises(
        StorageError, match="It is Trimtab's cache: the environment variable TRIMTAB_CACHE can name another folder"
    ):
        files.write_text(cache.cache_folder() / "x" / "y", "z")
    (tmp_path / "other").write_text("a file")
    with pytest.raises(StorageError) as elsewhere:
        files.write_text(tmp_path / "other" / "x", "y")
    assert "TRIMTAB_CACHE" not in str(elsewhere.value)


def test_a_user_without_a_home_has_a_cache_all_the_same(monkeypatch):
    from pathlib import Path

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("TRIMTAB_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert cache.cache_folder().is_absolute()


def test_json_has_no_numbers_for_what_is_none():
    value = {"a": [math.nan, (math.inf, -math.inf)], "b": {"c": 1.5, "d": None, "e": True, "f": "nan"}}
    assert files.to_json(value) == {"a": ["nan", ["inf", "-inf"]], "b": {"c": 1.5, "d": None, "e": True, "f": "nan"}}
