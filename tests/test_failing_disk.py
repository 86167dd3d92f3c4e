"""A disk that fails, beneath everything: every call of the system's that writes, in turn, by whichever library it is made."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_resume import RECIPE, assert_same, result_status
from worlds import ROWS, WHOLE, make_model, write_rows

HERE = Path(__file__).parent


def test_a_disk_that_fails_loses_nothing(tmp_path, monkeypatch):
    """Where a call fails, or all from it on, the run ends with a message that names the file, and goes on to the same end."""
    lines = on_a_failing_disk(tmp_path, monkeypatch, share=3 if WHOLE else 9)
    failed = {line["failed"] for line in lines}
    assert failed >= {"write", "open", "fsync", "rename", "mkdir"}
    assert sum(line["status"] != 0 for line in lines) >= (50 if WHOLE else 16)


def on_a_failing_disk(folder, monkeypatch, share):
    """What became of one in `share` of the calls; asserts that nothing was lost."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("no C compiler here")
    shim = folder / "failing_disk.so"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", shim, HERE / "failing_disk.c", "-ldl"], check=True)
    make_model(folder / "tiny", 0)
    write_rows(folder / "rows.jsonl", ROWS)
    (folder / "r.yaml").write_text(RECIPE.replace("epochs: 2", "epochs: 0.6"))
    monkeypatch.chdir(folder)
    done = subprocess.run(
        [sys.executable, HERE / "failing_disk.py", folder, str(share)], capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "LD_PRELOAD": str(shim), "TRIMTAB_CACHE": str(folder / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    for line in lines:
        if line["status"] == 0:  # what failed was not needed, such as to tidy up, or to make a folder that is there
            assert line["failed"] not in ("write", "open", "fsync"), line
        else:
            assert (line["status"], line["done"]) == (6, False), line
            assert line["run"] in line["said"], line
            assert all(status in (0, 6) for status, _ in line["again"]), line
            assert not line["again"] or line["again"][-1][0] == 0, line
        assert result_status(line["run"]) == "done"
        assert_same(line["run"], "spared")
    return lines
