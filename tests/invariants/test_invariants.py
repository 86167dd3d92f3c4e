"""Every invariant on every method, and on every family."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import method_of
from safetensors.torch import load_file
from worlds import WHOLE, combinations

from invariants.suite import CASES, ELSEWHERE, INVARIANTS, LEARNING, METHODS, ROWS, SAMPLE, case_of, logits
from trimtab.base import Base
from trimtab.deploy import save_adapter
from trimtab.engine import generate
from trimtab.methods import Method, attach

REFERENCES = Path(__file__).parents[1]


@pytest.mark.parametrize("name", INVARIANTS)
@pytest.mark.parametrize(("method", "family"), CASES, ids=lambda one: one)
def test_it_holds(name, method, family, tmp_path):
    INVARIANTS[name](case_of(method, family, tmp_path))


@pytest.mark.parametrize("name", [name for name in INVARIANTS if name[:3] in LEARNING])
@pytest.mark.parametrize("family", ["llama", "gpt2"] if WHOLE else ["llama"])
@pytest.mark.parametrize(("method", "objective"), combinations(METHODS, ["dpo", "kto"]))
def test_it_holds_where_answers_are_compared(name, family, objective, method, tmp_path):
    INVARIANTS[name](case_of(method, family, tmp_path, objective))


def test_the_catalogue_is_complete():
    numbers = {name[:3] for name in INVARIANTS} | ELSEWHERE.keys()
    assert numbers == {f"I{n:02}" for n in range(1, 36)}
    assert len(INVARIANTS) + len(ELSEWHERE) == 35


def test_every_method_has_a_test_against_its_equation():
    """I09: the methods' own tests compare with formulas written out in them, by these names."""
    text = "".join(path.read_text() for path in REFERENCES.glob("test_*.py"))
    assert EQUATIONS.keys() == set(Method.names())
    assert [name for name in EQUATIONS.values() if f"def {name}(" not in text] == []


EQUATIONS = {
    "bitfit": "test_bitfit_is_its_equation_in_float64",
    "bottleneck": "test_a_block_is_its_equation_in_float64",
    "dora": "test_dora_is_its_equation_and_its_norm_counts_as_constant",
    "full": "test_gradients_of_all_parameters_are_those_of_the_plain_model",
    "ia3": "test_ia3_is_its_equations_in_float64",
    "layernorm": "test_layernorm_tuning_is_the_norms_equation_with_other_weights",
    "lora": "test_lora_is_its_equation_in_float64",
    "miss": "test_miss_repeats_its_block_along_the_inputs",
    "oft": "test_oft_turns_blocks_of_its_inputs",
    "prefix": "test_packed_rows_see_the_text",
    "prompt": "test_packed_rows_see_the_text",
    "ptuning": "test_the_encoder_is_its_equations_in_float64",
    "ptuning_v2": "test_packed_rows_see_the_text",
    "tokens": "test_it_is_the_model_with_those_rows_of_its_tables_in_their_place",
}

READER = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
from safetensors.torch import save_file
from families import tiny
from invariants.suite import logits
from trimtab.base import Base
from trimtab.deploy import load_adapter
found = {}
for name, family, folder in json.loads(sys.stdin.read()):
    base = Base(tiny(family))
    adapter = load_adapter(base, folder)
    found[f"{name} {family} logits"] = logits(base.model)
    for key, tensor in adapter.state().items():
        found[f"{name} {family} {key}"] = tensor
save_file(found, sys.argv[2])
"""


@pytest.fixture(scope="module")
def read_elsewhere(tmp_path_factory):
    """Every method on every family: saved here, and read by a process that knows of nothing but the folders."""
    folder, here, jobs = tmp_path_factory.mktemp("fresh"), {}, []
    for name, family in CASES:
        case = case_of(name, family, folder / f"{name}-{family}")
        base, adapter = case.based()
        save_adapter(base, adapter, case.folder)
        _, tensors = adapter.to_inference_form()
        here[name, family] = (logits(base.model), tensors)
        jobs.append((name, family, str(case.folder)))
    out = folder / "found.safetensors"
    command = [sys.executable, "-W", "ignore", "-c", READER, str(REFERENCES), str(out)]
    done = subprocess.run(command, input=json.dumps(jobs), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return here, load_file(out)


@pytest.mark.parametrize(("method", "family"), CASES, ids=lambda one: one)
def test_a_fresh_process_reads_what_was_saved(method, family, read_elsewhere):
    """I11: equal tensors; equal logits, to the last bit where nothing was folded."""
    here, found = read_elsewhere
    expected, tensors = here[method, family]
    names = {key.removeprefix(f"{method} {family} ") for key in found if key.startswith(f"{method} {family} ")} - {"logits"}
    assert names == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[f"{method} {family} {name}"], tensor)
        assert found[f"{method} {family} {name}"].dtype == torch.float32
    torch.testing.assert_close(found[f"{method} {family} logits"], expected, rtol=1e-5, atol=1e-5)


TOO_SMALL = {"tokens": "trains the embeddings of some tokens alone: it can't learn rows by heart in a random model"}
RATES = {"full": 3e-3, "lora": 1e-2, "dora": 1e-2, "ia3": 1e-1, "prefix": 1e-2}
STEPS = {"bitfit": 500, "ia3": 800, "layernorm": 400}


@pytest.mark.parametrize("name", Method.names())
def test_it_learns_rows_by_heart(name, tmp_path):
    """I35: loss below 0.05 on eight rows, and the greedy answer is the row, its stop token included."""
    if name in TOO_SMALL:
        pytest.skip(TOO_SMALL[name])
    case = case_of(name, "llama", tmp_path)
    base = Base(case.fresh())
    with torch.no_grad():
        base.model.lm_head.weight *= 5  # so that a normed hidden state can say "surely"
    adapter = attach(base.model, method_of(name), sample=SAMPLE)
    losses = case.learn(base, adapter, STEPS.get(name, 200), RATES.get(name, 3e-2))
    assert losses[0] > 2
    assert losses[-1] < 0.05
    prompts = [row.ids[: row.target_indices[0]] for row in ROWS]
    for row, said in zip(ROWS, generate(base.model, prompts, [], max_new_tokens=14), strict=True):
        assert said[: len(row.target_indices)] == [row.ids[t] for t in row.target_indices]
