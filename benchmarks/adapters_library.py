"""Exchange bottleneck adapters with the `adapters` library, which needs an older Transformers and so an environment of its own.

    python -m venv LIBRARY; LIBRARY/bin/pip install torch adapters==1.3.0
    LIBRARY/bin/python benchmarks/adapters_library.py theirs WORK     makes tiny base models, adapters and the library's logits
    python benchmarks/adapters_library.py ours WORK                   loads the library's, compares logits; saves Trimtab's
    LIBRARY/bin/python benchmarks/adapters_library.py check WORK      loads Trimtab's, compares logits

`theirs FOLDER llama gpt2` reproduces tests/fixtures/adapters_library, bit for bit.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

VOCABULARY = 97
IDS = torch.tensor([[3, 14, 15, 92, 65], [27, 18, 28, 18, 28]])
_SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=32, bos_token_id=1, eos_token_id=2, pad_token_id=2,
)  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _SIZES,
    "gpt2": dict(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=2),
    "mistral": _SIZES,
    "qwen2": _SIZES,
    "qwen3": _SIZES | {"head_dim": 8},
    "gemma2": _SIZES | {"head_dim": 4, "sliding_window": 4},
    "gemma3_text": _SIZES | {"head_dim": 4, "sliding_window": 4},
    "phi": _SIZES,
}
AFTER_MLP = {"mh_adapter": False, "output_adapter": True, "original_ln_before": False}
THEIRS: dict[str, dict[str, Any]] = {
    "double_seq_bn": {"reduction_factor": 4},
    "after_mlp": AFTER_MLP | {"reduction_factor": 3, "non_linearity": "gelu", "scaling": 2.5},
    "seq_bn": {"reduction_factor": 4},  # refused by Trimtab, as is the next: they read the residual stream
    "par_bn": {"reduction_factor": 4},
}
ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "tanh")
CLOSE = dict(
    rtol=1e-4, atol=1e-4
)  # Gemma 2, which attends otherwise in the two versions of Transformers, differs by 1e-5 itself


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


@torch.no_grad()
def randomize(parameters: Any, seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(parameters):
        parameter.copy_(size * torch.randn(parameter.shape, generator=generator))


def theirs(work: Path, families: list[str]) -> None:
    import adapters
    import transformers

    for family in families:
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **FAMILIES[family]))
        randomize([(n, p) for n, p in model.named_parameters() if "norm" not in n and "ln_" not in n], 0, 0.3)
        model.eval().save_pretrained(work / family / "base")
        (work / family / "base" / "generation_config.json").unlink(missing_ok=True)
        given = {"ids": IDS, "base": logits(model)}
        adapters.init(model)
        for name, asked in THEIRS.items():
            kind = adapters.BnConfig if name == "after_mlp" else type(adapters.ADAPTER_CONFIG_MAP[name])
            if family not in ("llama", "gpt2", "mistral") and name in ("seq_bn", "par_bn"):
                continue  # which some interfaces cannot hook
            model.add_adapter(name, config=kind(**asked))
            randomize([(n, p) for n, p in model.named_parameters() if f".adapters.{name}." in n], 1, 0.3)
            model.set_active_adapters(name)
            given[name] = logits(model)
            model.save_adapter(str(work / family / name), name, use_safetensors=True, with_head=False)
            _forget_path(work / family / name / "adapter_config.json")
        save_file(given, work / family / "logits.safetensors")


def _forget_path(path: Path) -> None:
    """The library writes from where it loaded the base: nothing that a fixture should hold."""
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_name": ""}, indent=2, sort_keys=True) + "\n")


def ours(work: Path, families: list[str]) -> None:
    from trimtab.base import Base
    from trimtab.core.errors import ArtifactError
    from trimtab.deploy import load_adapter, save_adapter
    from trimtab.methods import attach
    from trimtab.methods.bottleneck import BottleneckAdapter

    for family in families:
        given = load_file(work / family / "logits.safetensors")
        for name in given.keys() - {"ids", "base"}:
            base = Base.load_folder(work / family / "base", torch.float32, torch.device("cpu"), with_tokenizer=False)
            try:
                adapter = load_adapter(base, work / family / name)
            except ArtifactError as error:
                print(f"{family:12} their {name:14} refused: {str(error).partition(': ')[2][:90]}…")
                continue
            _compare(family, f"their {name}", logits(base.model), given[name], given["base"])
            save_adapter(base, adapter, work / family / "ours" / name)
            save_file({"logits": given[name]}, work / family / "ours" / f"{name}.safetensors")
        for kind in ("houlsby", "pfeiffer"):
            for number, activation in enumerate(ACTIVATIONS):
                base = Base.load_folder(work / family / "base", torch.float32, torch.device("cpu"), with_tokenizer=False)
                method = BottleneckAdapter(kind=kind, width=3 + 5 * number, activation=activation, scale=1.0 + number / 2)
                adapter = attach(base.model, method)
                randomize(adapter.parameters().items(), 2, 0.3)
                save_adapter(base, adapter, work / family / "ours" / f"{kind}-{activation}")
                save_file({"logits": logits(base.model)}, work / family / "ours" / f"{kind}-{activation}.safetensors")


def check(work: Path, families: list[str]) -> None:
    import adapters
    import transformers

    for family in families:
        given = load_file(work / family / "logits.safetensors")
        for file in sorted((work / family / "ours").glob("*.safetensors")):
            model = transformers.AutoModelForCausalLM.from_pretrained(work / family / "base").eval()
            adapters.init(model)
            info: dict[str, Any] = {}
            name = model.load_adapter(str(file.with_suffix("")), use_safetensors=True, set_active=True, loading_info=info)
            assert not [*info["missing_keys"], *info["unexpected_keys"]], info
            model.set_active_adapters(name)
            _compare(family, f"our {file.stem}", logits(model), load_file(file)["logits"], given["base"])


def _compare(family: str, what: str, got: torch.Tensor, wanted: torch.Tensor, base: torch.Tensor) -> None:
    torch.testing.assert_close(got, wanted, **CLOSE)
    change = float((wanted - base).abs().max())
    assert change > 0.1
    print(f"{family:12} {what:22} differs by {float((got - wanted).abs().max()):.1e}; the adapter changes {change:.1f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["theirs", "ours", "check"])
    parser.add_argument("work", type=Path)
    parser.add_argument("families", nargs="*", default=list(FAMILIES))
    chosen = parser.parse_args()
    {"theirs": theirs, "ours": ours, "check": check}[chosen.what](chosen.work, chosen.families or list(FAMILIES))
