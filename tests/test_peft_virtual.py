"""The real PEFT library loads our prefixes and prompts, and we load its; logits of a row's tokens are the same both ways."""

import json

import pytest
import torch
from families import FAMILIES, perturb, random_rows, tiny
from safetensors.torch import load_file, save_file

from trimtab.base import Base
from trimtab.core.errors import ArtifactError
from trimtab.data import Segment
from trimtab.deploy import load_adapter, save_adapter
from trimtab.engine.forward import hidden_states
from trimtab.engine.head import head_of
from trimtab.engine.layouts import PackLayout
from trimtab.methods import Method, Sample, attach
from trimtab.methods.prefix import PrefixTuning
from trimtab.methods.prompt import PromptTuning
from trimtab.methods.ptuning import PTuning
from trimtab.methods.ptuning_v2 import PTuningV2

peft = pytest.importorskip("peft")

P, LENGTH = 6, 11
IDS = torch.tensor(random_rows(LENGTH, LENGTH))
TEXT = random_rows(P, seed=5)
OURS = {
    "prefix": (PrefixTuning(tokens=P, width=8), "PREFIX_TUNING"),
    "ptuning_v2": (PTuningV2(tokens=P), "PREFIX_TUNING"),
    "prompt": (PromptTuning(tokens=P), "PROMPT_TUNING"),
    "ptuning": (PTuning(tokens=P, width=8, encoder="lstm"), "P_TUNING"),
}
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's own
COMMON = dict(num_virtual_tokens=P, task_type="CAUSAL_LM")
THEIRS = {
    "prefix": (lambda: peft.PrefixTuningConfig(**COMMON), "ptuning_v2"),
    "prefix-projected": (
        lambda: peft.PrefixTuningConfig(**COMMON, prefix_projection=True, encoder_hidden_size=8),
        "ptuning_v2",
    ),
    "prompt": (lambda: peft.PromptTuningConfig(**COMMON), "prompt"),
    "prompt-sampled": (lambda: peft.PromptTuningConfig(**COMMON, prompt_tuning_init="SAMPLE_VOCAB"), "prompt"),
    "p-tuning-mlp": (lambda: peft.PromptEncoderConfig(**COMMON, encoder_hidden_size=8), "ptuning"),
    "p-tuning-lstm": (
        lambda: peft.PromptEncoderConfig(**COMMON, encoder_hidden_size=8, encoder_reparameterization_type="LSTM"),
        "ptuning",
    ),
}


@torch.no_grad()
def ours_of(model):
    """By Trimtab's own forward pass, which counts sliding windows rightly."""
    count = len(IDS)
    segments = tuple(Segment(n * LENGTH, (n + 1) * LENGTH, -1) for n in range(count))
    hidden = hidden_states(model, IDS.flatten(), torch.arange(LENGTH).repeat(count), PackLayout(segments))
    return head_of(model).logits(hidden).view(count, LENGTH, -1)


@torch.no_grad()
def theirs_of(model, **given):
    """Those of the rows, which stand last; a prompt's own stand before them."""
    return model(input_ids=IDS, **given).logits[:, -LENGTH:]


def saved(family, method, folder):
    base = Base(tiny(family))
    adapter = attach(base.model, method, sample=Sample(TEXT))
    perturb(adapter.parameters())
    save_adapter(base, adapter, folder)
    return base


def saved_by_peft(family, make, folder):
    model = peft.get_peft_model(tiny(family), make()).eval()
    perturb({name: p for name, p in model.named_parameters() if "prompt_encoder" in name})
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", OURS)
def test_peft_loads_ours(name, family, tmp_path):
    method, peft_type = OURS[name]
    base = saved(family, method, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["peft_type"] == peft_type
    theirs = peft.PeftModel.from_pretrained(tiny(family), tmp_path / "ours")
    torch.testing.assert_close(theirs_of(theirs), ours_of(base.model), rtol=0, atol=1e-5)
    assert (ours_of(base.model) - ours_of(tiny(family))).abs().max() > 1e-2
    again = Base(tiny(family))
    assert load_adapter(again, tmp_path / "ours").method.name == name
    assert torch.equal(ours_of(again.model), ours_of(base.model))


PLAIN = ("prefix", "prompt", "p-tuning-mlp")


@pytest.mark.parametrize(
    ("name", "family"),
    [(name, family) for name in PLAIN for family in FAMILIES] + [(name, "llama") for name in THEIRS if name not in PLAIN],
)
def test_we_load_pefts(name, family, tmp_path):
    make, expected = THEIRS[name]
    theirs = saved_by_peft(family, make, tmp_path / "theirs")
    base = Base(tiny(family))
    adapter = load_adapter(base, tmp_path / "theirs")
    assert (adapter.method.name, adapter.method.virtual_token_count) == (expected, P)
    torch.testing.assert_close(ours_of(base.model), theirs_of(theirs), rtol=0, atol=1e-5)
    # And back: what we save of it is PEFT's table, bit for bit.
    save_adapter(base, adapter, tmp_path / "ours")
    ours, table = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("ours", "theirs"))
    assert torch.equal(ours["prompt_embeddings"], table["prompt_embeddings"])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_row_begins_at_the_same_position(family, tmp_path):
    """For both, position 0 of a row is the one after the prefix."""
    base = saved(family, PTuningV2(tokens=P), tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(tiny(family), tmp_path / "ours")
    for first in (0, 1):
        positions = torch.arange(first, first + LENGTH)[None]
        with torch.no_grad():
            got = base.model(input_ids=IDS, position_ids=positions).logits
        torch.testing.assert_close(got, theirs_of(theirs, position_ids=positions), rtol=0, atol=1e-5)
        assert torch.allclose(got, ours_of(base.model), rtol=0, atol=1e-5) == (first == 0)


def test_each_kind_of_pefts_is_read_by_one_method():
    members = [Method.member(name) for name in Method.names()]
    for kind, name in {"PREFIX_TUNING": "ptuning_v2", "PROMPT_TUNING": "prompt", "P_TUNING": "ptuning"}.items():
        (reader,) = [m for m in members if m.recognizes({"peft_type": kind})]
        assert reader is Method.member(name)


def test_a_prompt_of_pefts_that_began_as_a_text_is_read(tmp_path):
    """PEFT writes the text and its tokenizer's name into the configuration; the embeddings say all that counts."""
    theirs = saved_by_peft("llama", THEIRS["prompt"][0], tmp_path / "theirs")
    _edit_config(
        tmp_path / "theirs", prompt_tuning_init="TEXT", prompt_tuning_init_text="Say yes.", tokenizer_name_or_path="gpt2"
    )
    base = Base(tiny("llama"))
    load_adapter(base, tmp_path / "theirs")
    torch.testing.assert_close(ours_of(base.model), theirs_of(theirs), rtol=0, atol=1e-5)


def _edit_config(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def _edit_tensors(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_transformer_submodules": 2}, "asks for what Trimtab does not do here: num_transformer_submodules: 2"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save: \['lm_head'\]"),
        ({"num_virtual_tokens": None}, "tokens: expected a whole number"),
        ({"num_virtual_tokens": 0}, "tokens: expected a whole number of at least 1|tokens: expected a number of at least 1"),
        ({"num_virtual_tokens": P + 1}, r"model\.\w+: has shape \(6, \d+\), expected \(7, \d+\)"),
    ],
)
def test_a_configuration_that_says_something_else_is_refused(name, values, message, tmp_path):
    saved_by_peft("llama", THEIRS[name][0], tmp_path / "theirs")
    _edit_config(tmp_path / "theirs", **values)
    base = Base(tiny("llama"))
    keys = list(base.model.state_dict())
    with pytest.raises(ArtifactError, match=message):
        load_adapter(base, tmp_path / "theirs")
    assert list(base.model.state_dict()) == keys


@pytest.mark.parametrize("name", ["prefix", "prompt"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.clear(), "holds nothing, where virtual tokens are prompt_embeddings alone"),
        (lambda t: t.update(extra=torch.zeros(1)), r"holds (extra, prompt_embeddings|prompt_embeddings, extra), where"),
        (lambda t: t.update(prompt_embeddings=t["prompt_embeddings"][:, 1:].contiguous()), "has shape"),
        (lambda t: t["prompt_embeddings"][2, 1].fill_(float("nan")), "not finite"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(name, change, message, tmp_path):
    saved_by_peft("llama", THEIRS[name][0], tmp_path / "theirs")
    _edit_tensors(tmp_path / "theirs", change)
    with pytest.raises(ArtifactError, match=message):
        load_adapter(Base(tiny("llama")), tmp_path / "theirs")


def test_a_prefix_for_another_number_of_layers_is_refused(tmp_path):
    """The configuration's sizes are not read: the table's shape tells."""
    saved_by_peft("llama", lambda: peft.PrefixTuningConfig(**COMMON, num_layers=1), tmp_path / "theirs")
    with pytest.raises(ArtifactError, match=r"model.keys_and_values: has shape \(6, 32\), expected \(6, 64\)"):
        load_adapter(Base(tiny("llama")), tmp_path / "theirs")
