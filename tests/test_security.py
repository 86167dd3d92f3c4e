"""What is read is data: nothing is unpickled, evaluated or fetched, no code of a model folder runs, templates are limited."""

import io
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import transformers
from worlds import CHATML, make_model

from trimtab.base import Base, limits
from trimtab.errors import DataError, TrimtabError, UnsupportedModel

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


def planted(folder, known):
    """A model folder that asks for code of its own everywhere, each file of which would leave a trace; and where the trace would be."""
    trace = folder.parent / "it-ran"
    code = f"with open({str(trace)!r}, 'a') as file:\n    file.write(__file__)\n"
    for name in ("configuration_x.py", "modeling_x.py", "tokenization_x.py"):
        (folder / name).write_text(code + "class C: pass\nclass M: pass\nclass T: pass\n")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code + "def generate(model, *args, **kwargs): pass\n")
    names = {
        "AutoConfig": "configuration_x.C",
        "AutoModelForCausalLM": "modeling_x.M",
        "AutoTokenizer": ["tokenization_x.T"] * 2,
    }
    for file in ("config.json", "tokenizer_config.json", "generation_config.json"):
        content = json.loads((folder / file).read_text()) | {"auto_map": names}
        if not known:
            content |= {"model_type": "x"} if file == "config.json" else {"tokenizer_class": "XTokenizer"}
        (folder / file).write_text(json.dumps(content))
    return trace


@pytest.mark.parametrize("known", [True, False], ids=["of a known kind", "of an unknown kind"])
def test_code_in_a_model_folder_never_runs_whatever_is_answered(known, here, trimtab, monkeypatch):
    """Transformers would ask on standard input, and take a y that is piped there for a yes."""
    trace = planted(here / "tiny", known)
    for words in (
        ("check", "r.yaml"), ("train", "r.yaml", "output=new", "train.epochs=1"), ("methods", "tiny"),
        ("merge", "run", "merged", "--model", "tiny"), ("chat", "run", "--model", "tiny", "--prompt", "x", "--max-new-tokens", 1),
    ):  # fmt: skip
        monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
        done = trimtab(*words)
        assert not trace.exists(), (words, trace.read_text())
        assert sys.stdin.tell() == 0, f"{words} was asked something"
        assert known or done.code in (2, 4), (words, done)


def test_the_real_command_is_not_talked_into_it_either(here):
    trace = planted(here / "tiny", known=False)
    done = subprocess.run(
        [sys.executable, "-m", "trimtab", "train", "r.yaml", "output=new"], cwd=here, env={**os.environ, "OMP_NUM_THREADS": "1"},
        input="y\n" * 100, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done
    assert "can only be read by code of its own (auto_map), and code from a model folder or hub is never run" in done.stderr
    assert not trace.exists()


def test_the_trace_would_be_left(world, tmp_path, monkeypatch):
    """The negative control: Transformers, asked without a word about it."""
    trace = planted(shutil.copytree(world / "tiny", tmp_path / "tiny"), known=False)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises((AttributeError, ValueError)):  # it is no real configuration
        transformers.AutoConfig.from_pretrained(tmp_path / "tiny")
    assert trace.exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_a_kernel_of_the_hub_is_not_fetched_because_a_folder_asks_for_it(key, world, tmp_path):
    copy = shutil.copytree(world / "tiny", tmp_path / "tiny")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {key: "someone/kernel"}))
    with pytest.raises(UnsupportedModel, match=rf"asks in config\.json for code from the hub \({key}: someone/kernel\)"):
        Base.load(str(copy))
    (copy / "config.json").write_text(json.dumps(config | {key: "eager"}))
    Base.load(str(copy))


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
