"""The names that `import trimtab` offers: each is there, documented and lazy, and there are no others."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import trimtab

METHODS = {
    "BitFit", "BottleneckAdapter", "DoRA", "Full", "IA3", "LayerNormTuning", "LoRA", "MiSS", "OFT", "PTuning", "PTuningV2",
    "PrefixTuning", "PromptTuning", "Tokens",
}  # fmt: skip
OBJECTIVES = {"CPO", "DPO", "KTO", "ORPO", "SFT", "SimPO"}
SURFACE = METHODS | OBJECTIVES | {
    "AdapterLayer", "Attached", "Base", "Generation", "Method", "Objective", "Recipe", "RunObserver", "TrainConfig", "TrimtabError",
    "activate", "active", "adapters", "answer", "answers", "attach", "combine", "fit", "generate", "load", "load_adapter", "merge",
    "method", "rows", "run_recipe", "sample", "save_adapter", "score", "score_loss", "stream",
}  # fmt: skip
"""What users may rely on. A name goes away only with a line in CHANGELOG.md."""

HEAVY = (
    "torch",
    "transformers",
    "numpy",
    "pydantic",
    "yaml",
    "rich",
    "safetensors",
    "datasets",
    "tokenizers",
    "huggingface_hub",
)


def python(program):
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_all_is_the_names_and_the_version():
    assert sorted(trimtab.__all__) == sorted([*trimtab._HOMES, "__version__"])
    assert set(trimtab._HOMES) == SURFACE
    assert dir(trimtab) == sorted(trimtab.__all__)
    assert trimtab.__all__[:-1] == sorted(trimtab._HOMES)


@pytest.mark.parametrize(("family", "names"), [(trimtab.Method, METHODS), (trimtab.Objective, OBJECTIVES)])
def test_every_file_of_the_families_is_offered_as_its_class(family, names):
    assert {family.member(name) for name in family.names()} == {getattr(trimtab, name) for name in names}


@pytest.mark.parametrize("name", sorted(trimtab._HOMES))
def test_every_name_leads_to_something_of_ours_with_a_docstring(name):
    found = getattr(trimtab, name)
    assert found.__name__ == name
    assert found.__module__.startswith("trimtab.")
    assert f"trimtab.{trimtab._HOMES[name]}" in (found.__module__, found.__module__.rpartition(".")[0])
    assert inspect.getdoc(found)
    assert getattr(trimtab, name) is found


def test_every_name_is_also_imported_for_type_checkers_from_the_same_place():
    text = Path(trimtab.__file__).read_text()
    below = text[text.index("if TYPE_CHECKING:") :]
    said = {}
    for line in below.splitlines()[1:]:
        module, names = line.strip().removeprefix("from trimtab.").split(" import ")
        said |= dict.fromkeys(names.replace(" as", ",").split(", "), module)
    assert said == trimtab._HOMES


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError) as caught:
        _ = trimtab.lora
    assert str(caught.value) == "module 'trimtab' has no attribute 'lora'"
    with pytest.raises(ImportError):
        from trimtab import nothing  # noqa: F401


def test_importing_it_imports_nothing_heavy_and_a_name_only_what_it_needs():
    loaded = f"print(*(name for name in {HEAVY} if name in sys.modules))"
    assert python(f"import sys, trimtab; dir(trimtab); trimtab.__all__; {loaded}") == ""
    assert python(f"import sys, trimtab; trimtab.TrimtabError; {loaded}") == ""
    assert python(f"import sys, trimtab; trimtab.__version__; {loaded}") == ""
    assert python("import sys, trimtab; trimtab.LoRA; print('transformers' in sys.modules)") == "False"


def test_the_version_is_the_installed_one():
    from importlib import metadata

    assert trimtab.__version__ == metadata.version("trimtab")
