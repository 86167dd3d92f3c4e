"""What is read is data: nothing is unpickled, evaluated or fetched, no code of a model folder runs, templates are limited."""

import hashlib
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

import trimtab as package
from trimtab.base import Base, ModelConfig, render_limits
from trimtab.certify import certificate
from trimtab.core import files
from trimtab.core.errors import DataError, NotCertified, TrimtabError, UnsupportedModel
from trimtab.core.process import module_command
from trimtab.engine.backends._compile import SOURCE, compile_library, load_library

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
    done, events = watched(here, "merge", "--force", "new", "merged")
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
        ("merge", "--force", "run", "merged", "--model", "tiny"), ("chat", "run", "--model", "tiny", "--prompt", "x", "--max-new-tokens", 1),
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
    assert "can only be read by custom code (auto_map), and code from a model folder or hub is never run" in done.stderr
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


LIMITED = render_limits.limited_time
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
        said = base.template.render([{"role": "user", "content": "x"}])
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
    monkeypatch.setattr(render_limits, "CHARACTERS", 1_000_000)
    monkeypatch.setattr(render_limits.render_within_limits, "__defaults__", (1.0,))
    make_model(tmp_path / "tiny", 0, template=loop + CHATML)
    base = Base.load(str(tmp_path / "tiny"))
    started = time.monotonic()
    with pytest.raises(DataError, match="chat template"):
        base.template.render([{"role": "user", "content": "x"}])
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("constant", ["'a' * 10000000000", "(('a' * 9999) * 9999) * 9999"])
def test_a_template_is_not_compiled_without_limits_to_find_its_switches(constant, tmp_path, one_thread):
    """Jinja computes constants while it compiles."""
    make_model(tmp_path / "tiny", 0, template=f"{{{{ {constant} }}}}" + CHATML)
    started = time.monotonic()
    with pytest.raises(TrimtabError, match="chat template"):
        Base.load(ModelConfig(name=str(tmp_path / "tiny"), template={"loud": True}))
    assert time.monotonic() - started < 10


DOUBLING = "{% set x = namespace(a='a' * 6000) %}{% for _ in range(17) %}{% set x.a = x.a ~ x.a %}{% endfor %}{{ x.a[:3] }}"


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="this system does not say how much memory a process has")
def test_a_template_that_takes_all_memory_is_refused(tmp_path, one_thread, monkeypatch):
    make_model(tmp_path / "tiny", 0, template=DOUBLING + CHATML)
    base, before = Base.load(str(tmp_path / "tiny")), resource.getrlimit(resource.RLIMIT_AS)
    monkeypatch.setattr(render_limits, "MEMORY", 64 << 20)
    with pytest.raises(DataError, match=r"chat template needs more than 0\.1 GB of memory"):
        base.template.render([{"role": "user", "content": "x"}])
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    monkeypatch.setattr(render_limits, "MEMORY", 2 << 30)  # it takes 1.2 GB for a moment
    assert base.template.render([{"role": "user", "content": "x"}]).startswith("aaa<|im_start|>user")


def forever(seconds):
    with LIMITED(seconds):
        while True:
            pass


def test_a_limit_is_of_its_own_block_and_thread():
    with LIMITED(0.3):
        pass
    time.sleep(0.8)  # nothing comes later
    with pytest.raises(render_limits.RenderTimeout):
        forever(0.3)
    done = []
    thread = threading.Thread(target=lambda: done.append(sum(range(1000))))
    with LIMITED(30.0):
        thread.start()
        thread.join()
    assert done == [499500]


# What would run because of where it lies


def shadowing(folder, *names):
    """Modules that leave a trace when they are imported."""
    for name in names:
        (folder / f"{name}.py").write_text(
            f"open({str(folder / 'trace')!r}, 'a').write('{name} ')\nraise SystemExit('{name} ran')\n"
        )


def test_the_certificates_process_imports_nothing_from_the_folder_that_it_is_run_in(tmp_path, monkeypatch):
    shadowing(tmp_path, "random", "json", "torch", "runpy", "trimtab", "site", "typing")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotCertified, match=f"model: {tmp_path}/none: no such file or folder"):
        certificate._measure_in_new_process(certificate._loading_job(tmp_path / "none", [], None))
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("command", [module_command("trimtab"), [sys.executable, "-m", "trimtab"]], ids=["fresh", "-m"])
def test_a_process_of_ours_imports_nothing_from_the_folder_that_it_is_run_in(command, tmp_path):
    shadowing(tmp_path, "random", "argparse", "signal")
    done = subprocess.run([*command, "--version"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == (f"trimtab {package.__version__}\n", "")
    assert not (tmp_path / "trace").exists()


def test_what_is_planted_would_run(tmp_path):
    """The negative control."""
    shadowing(tmp_path, "random")
    done = subprocess.run([sys.executable, "-m", "tempfile"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (tmp_path / "trace").read_text() == "random "
    assert done.stderr == "random ran\n"


def test_every_process_that_is_started_is_told_so():
    """No other file of the package starts Python but by `module_command`, or with PYTHONSAFEPATH for another interpreter."""
    house = Path(package.__file__).parent
    for path in house.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert '"-m", "' not in text, path
        if "subprocess.run(" in text and path.name != "_compile.py":  # which runs a compiler
            assert text.count("subprocess.run(") == text.count("env="), path
            assert "module_command" in text, path


def test_a_fresh_process_finds_what_any_other_does():
    said = "import json, sys, site; print(json.dumps([sys.path, site.ENABLE_USER_SITE]))"
    before, _, _ = module_command("trimtab")[-1].partition("import runpy")
    fresh, other = (
        json.loads(subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True, cwd="/").stdout)
        for words in (["-P", "-c", before + said], ["-c", said])
    )
    assert fresh == [[*other[0][1:], str(Path(package.__file__).parents[1])], other[1]]


TRACE = r"""
#include <stdio.h>
static void __attribute__((constructor)) loaded(void) { FILE *f = fopen("%s", "w"); fputs("ran", f); fclose(f); }
"""


@pytest.fixture
def library(tmp_path):
    """The bytes of a library that leaves a trace when it is loaded."""
    if load_library() is None:
        pytest.skip("no C compiler here")
    (tmp_path / "trace.c").write_text(TRACE % (tmp_path / "trace"))
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "trace.so", tmp_path / "trace.c"], check=True)
    return (tmp_path / "trace.so").read_bytes()


@pytest.mark.parametrize(
    "how", ["as it is", "another owner", "others may write", "a folder others may write into", "another hash"]
)
def test_a_library_that_somebody_else_can_have_put_into_the_cache_is_not_loaded(how, library, tmp_path, monkeypatch):
    folder, compiled = tmp_path / "cache" / "kernels", []
    run = subprocess.run
    assert compile_library(SOURCE, folder, "-O0") is not None
    (kept,) = folder.iterdir()
    assert [path.stat().st_mode & 0o777 for path in (folder, kept)] == [0o700, 0o600]
    name = kept.name.partition("-")[0]
    kept.unlink()
    digest = hashlib.sha256(library).hexdigest() if how != "another hash" else 64 * "0"
    planted = folder / f"{name}-{digest}.so"
    files.write_bytes(planted, library, private=True)
    if how == "another owner":
        os.chown(planted, 12345, 12345) if os.getuid() == 0 else monkeypatch.setattr(os, "getuid", lambda: 12345)
    elif how == "others may write":
        planted.chmod(0o660)
    elif how == "a folder others may write into":
        folder.chmod(0o770)
    monkeypatch.setattr(subprocess, "run", lambda *given, **more: compiled.append(1) or run(*given, **more))
    loaded = compile_library(SOURCE, folder, "-O0")
    assert loaded is not None
    assert (tmp_path / "trace").exists() == (how == "as it is"), "the negative control"
    assert bool(compiled) == (how != "as it is")
    if how != "as it is":
        assert loaded.f32_norm is not None
    assert not list(folder.glob(f"{files.TEMPORARY}*"))


def test_a_library_of_ones_own_is_compiled_once(library, tmp_path, monkeypatch):
    first = compile_library(SOURCE, tmp_path / "mine", "-O0")
    monkeypatch.setattr(subprocess, "run", None)
    assert compile_library(SOURCE, tmp_path / "mine", "-O0").f32_norm is not None
    assert first is not None


def test_where_the_cache_cannot_be_written_the_library_is_compiled_all_the_same(library, tmp_path):
    (tmp_path / "file").write_text("")
    assert compile_library(SOURCE, tmp_path / "file" / "kernels", "-O0").f32_norm is not None
