"""What is read is data: nothing is unpickled, evaluated or fetched, no code of a model folder runs, templates are limited."""

import json
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from worlds import CHATML, make_model

from trimtab.base import Base, limits
from trimtab.errors import DataError, TrimtabError

WATCHED = """
import os, sys
log = open(os.environ["WATCHED"], "a")
def hook(event, args):
    if event in ("pickle.find_class", "marshal.load", "os.system", "os.exec", "socket.connect", "socket.getaddrinfo", "urllib.Request"):
        log.write(f"{event} {args!r}\\n")
        log.flush()
sys.addaudithook(hook)
"""


def paths(here):
    return os.pathsep.join([str(here), *filter(None, [os.environ.get("PYTHONPATH")])])


def watched(here, *words):
    """The real command, and what it did that it must not do."""
    (here / "sitecustomize.py").write_text(WATCHED)
    log = here / "events.txt"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths(here), "WATCHED": str(log)}
    done = subprocess.run(
        [sys.executable, "-m", "trimtab", *words], cwd=here, env=environment, capture_output=True, text=True, check=False
    )
    return done, log.read_text().splitlines() if log.exists() else []


def test_training_and_certifying_unpickle_nothing_and_connect_to_nothing(here):
    done, events = watched(here, "train", "r.yaml", "output=new", "certify=true", "train.epochs=4")
    assert done.returncode == 0, done.stderr
    assert events == []
    done, events = watched(here, "merge", "new", "merged")
    assert done.returncode == 0, done.stderr
    assert events == []


def test_the_hook_sees_what_it_watches(here):
    """The negative control."""
    (here / "sitecustomize.py").write_text(WATCHED)
    script = "import pickle, os, socket\npickle.loads(pickle.dumps(os.getcwd))\nsocket.socket().connect_ex(('127.0.0.1', 9))"
    environment = {**os.environ, "PYTHONPATH": paths(here), "WATCHED": str(here / "events.txt")}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
    events = [line.split()[0] for line in (here / "events.txt").read_text().splitlines()]
    assert {"pickle.find_class", "socket.connect"} <= set(events)


def test_code_in_a_model_folder_never_runs(here, trimtab):
    config = json.loads((here / "tiny" / "config.json").read_text())
    marker = here / "it-ran"
    (here / "tiny" / "modeling_tiny.py").write_text(f"open({str(marker)!r}, 'w')\n")
    names = {"AutoConfig": "modeling_tiny.C", "AutoModelForCausalLM": "modeling_tiny.M", "AutoTokenizer": "modeling_tiny.T"}
    (here / "tiny" / "config.json").write_text(json.dumps({**config, "auto_map": names}))
    trimtab("train", "r.yaml", "output=new")
    assert not marker.exists()
    (here / "tiny" / "config.json").write_text(json.dumps({**config, "model_type": "tiny-custom", "auto_map": names}))
    refused = trimtab("train", "r.yaml", "output=second")
    assert refused.code == 2
    assert not marker.exists()


def test_a_pickle_in_an_adapter_folder_is_never_opened(here, trimtab):
    import pickle  # to make one

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(here / "it-ran"),)

    (here / "run" / "adapter" / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    (here / "run" / "adapter" / "adapter_model.safetensors").unlink()
    refused = trimtab("chat", "run", "--prompt", "x")
    assert refused.code == 4
    assert "a pickle, which is never read" in refused.err
    assert not (here / "it-ran").exists()


LIMITED = limits.limited
ATTACKS = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ messages.__class__.__base__ }}",
    "{{ self._TemplateReference__context }}",
    "{% set x = [].append.__self__.__class__.__bases__ %}{{ x }}",
    "{{ messages.append(1) }}",
    "{{ lipsum.__globals__['os'] }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ ''.join.__func__ }}",
    "{{ (1).__class__.__bases__[0].__subclasses__()[0] }}",
]


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_template_that_reaches_for_python_is_refused(attack, tmp_path, one_thread):
    make_model(tmp_path / "tiny", 0, template=attack + CHATML)
    try:
        base = Base.load(str(tmp_path / "tiny"))
        said = base.render([{"role": "user", "content": "x"}])
    except (DataError, TrimtabError):
        return
    assert "class" not in said
    assert "os" not in said.split("user")[0]
    assert "subclasses" not in said


@pytest.mark.parametrize("loop", [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
    "{{ 'a' * 10000000000 }}",
    "{{ ('a' * 9999) * 9999 }}",
    "{{ 99999 ** 99999 ** 99999 }}",
])  # fmt: skip
def test_a_template_that_never_ends_or_writes_without_end_is_refused_soon(loop, tmp_path, one_thread, monkeypatch):
    monkeypatch.setattr(limits, "CHARACTERS", 1_000_000)
    monkeypatch.setattr(limits.rendered, "__defaults__", (1.0,))
    make_model(tmp_path / "tiny", 0, template=loop + CHATML)
    base = Base.load(str(tmp_path / "tiny"))
    started = time.monotonic()
    with pytest.raises(DataError, match="chat template"):
        base.render([{"role": "user", "content": "x"}])
    assert time.monotonic() - started < 10


DOUBLING = "{% set x = namespace(a='a' * 6000) %}{% for _ in range(17) %}{% set x.a = x.a ~ x.a %}{% endfor %}{{ x.a[:3] }}"


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="this system does not say how much memory a process has")
def test_a_template_that_takes_all_memory_is_refused(tmp_path, one_thread, monkeypatch):
    make_model(tmp_path / "tiny", 0, template=DOUBLING + CHATML)
    base, before = Base.load(str(tmp_path / "tiny")), resource.getrlimit(resource.RLIMIT_AS)
    monkeypatch.setattr(limits, "MEMORY", 64 << 20)
    with pytest.raises(DataError, match=r"chat template needs more than 0\.1 GB of memory"):
        base.render([{"role": "user", "content": "x"}])
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    monkeypatch.setattr(limits, "MEMORY", 2 << 30)  # it takes 1.2 GB for a moment
    assert base.render([{"role": "user", "content": "x"}]).startswith("aaa<|im_start|>user")


def forever(seconds):
    with LIMITED(seconds):
        while True:
            pass


def test_a_limit_is_of_its_own_block_and_thread():
    with LIMITED(0.3):
        pass
    time.sleep(0.8)  # nothing comes later
    with pytest.raises(limits.TooLong):
        forever(0.3)
    done = []
    thread = threading.Thread(target=lambda: done.append(sum(range(1000))))
    with LIMITED(30.0):
        thread.start()
        thread.join()
    assert done == [499500]
