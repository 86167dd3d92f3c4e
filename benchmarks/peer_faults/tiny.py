"""Shared by the trials: a random model of two layers, a small tokenizer, an adapter, examples, and the peers' trainers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import peft
import torch
import transformers
import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|bos|>")
END_OF_TEXT, START, END, BOS = range(4)
VOCABULARY = 400
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML with the marks that tell Transformers and TRL what an assistant has said."""
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "initializer_range": 0.12, "bos_token_id": None,
    "eos_token_id": END, "pad_token_id": END_OF_TEXT,
}  # fmt: skip
CORPUS = [
    "hello hello world, the answer is hello",
    "user assistant system tool Question: Answer: yes no",
    "say it is 42, 4 and 2",
]


def llama(seed: int = 0, **settings: Any) -> transformers.LlamaForCausalLM:
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **settings})).eval()


def tokenizer(template: str = CHATML, *, eos: str = "<|im_end|>", begins: bool = False) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE. If it begins, it puts a BOS before every text, as Llama's do."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS * 4, trainer)
    if begins:
        backend.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", BOS)])
    beginning = {"bos_token": "<|bos|>"} if begins else {}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, pad_token="<|endoftext|>", **beginning)
    fast.chat_template = template
    return fast


def lora(**settings: Any) -> peft.LoraConfig:
    return peft.LoraConfig(
        **{"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **settings}
    )


def adapted(model: nn.Module, **settings: Any) -> peft.PeftModel:
    return peft.get_peft_model(model, lora(**settings)).eval()


def stirred(model: nn.Module, size: float = 0.1, seed: int = 1, name: str = "default") -> nn.Module:
    """The model with an adapter that is no longer at its first values, as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if f".{name}." in path:
                parameter.add_((size * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype))
    return model


def saved(folder: Path, model: Any) -> str:
    model.save_pretrained(str(folder))
    return str(folder)


def trained(seed: int = 1, **settings: Any) -> peft.PeftModel:
    """A tiny model with an adapter that has learned something."""
    return stirred(adapted(llama(), **settings), seed=seed)


def adapter(model: nn.Module) -> dict[str, Tensor]:
    """A copy of an adapter's numbers."""
    return {path: parameter.detach().clone() for path, parameter in model.named_parameters() if "lora_" in path}


def share_of_nan(tensors: dict[str, Tensor]) -> float:
    flat = torch.cat([tensor.flatten() for tensor in tensors.values()])
    return float(flat.isnan().double().mean())


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


IDS = torch.randint(4, 300, (2, 12), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor = IDS, **inputs: Any) -> Tensor:
    return model(input_ids=ids, use_cache=False, **inputs).logits


def apart(one: Tensor, other: Tensor) -> float:
    """How far one is from the other, as a share of the other."""
    one, other = one.detach().double(), other.detach().double()
    return float((one - other).norm() / other.norm())


def random_rows(*lengths: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Rows of tokens, every one of which but the first is learned."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(4, 300, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": row, "labels": list(row)} for row in ids]


ROWS = random_rows(*[16] * 8)
PAIRS = [{"prompt": f"say {n}", "chosen": f" it is {n}", "rejected": f" no {n} at all"} for n in range(8)]


def texts(*said: str) -> list[dict[str, str]]:
    return [{"text": text} for text in said]


def chat(*said: str, roles: tuple[str, ...] = ("user", "assistant")) -> dict[str, list[dict[str, str]]]:
    """A conversation, whose roles come in turn."""
    return {"messages": [{"role": roles[n % len(roles)], "content": text} for n, text in enumerate(said)]}


def _arguments(kind: Callable[..., Any], folder: Path, **settings: Any) -> Any:
    """A peer's settings as they are by default, but for the place, the CPU, and what makes a run short and told."""
    return kind(
        **{
            "output_dir": str(folder / "run"), "use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1,
            "save_strategy": "no", "per_device_train_batch_size": 4, "learning_rate": 1e-2, **settings,
        }
    )  # fmt: skip


def hf(folder: Path, model: nn.Module, rows: list[dict[str, list[int]]], **settings: Any) -> transformers.Trainer:
    """Transformers' own trainer, with the collator that pads labels too."""
    given = {key: settings.pop(key) for key in ("optimizers", "eval_dataset", "callbacks") if key in settings}
    return transformers.Trainer(
        model=model,
        args=_arguments(transformers.TrainingArguments, folder, **settings),
        train_dataset=rows,
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer()),
        **given,
    )


def sft(
    folder: Path,
    model: nn.Module,
    rows: list[dict[str, Any]] | datasets.Dataset,
    words: transformers.PreTrainedTokenizerFast | None = None,
    **settings: Any,
) -> trl.SFTTrainer:
    """TRL's SFTTrainer, in float32, for bfloat16 is its default on GPUs."""
    given = {key: settings.pop(key) for key in ("peft_config", "formatting_func") if key in settings}
    return trl.SFTTrainer(
        model=model,
        args=_arguments(trl.SFTConfig, folder, bf16=False, **settings),
        train_dataset=datasets.Dataset.from_list(rows) if isinstance(rows, list) else rows,
        processing_class=words or tokenizer(),
        **given,
    )


def dpo(folder: Path, model: nn.Module, rows: list[dict[str, Any]], **settings: Any) -> trl.DPOTrainer:
    given = {"peft_config": settings.pop("peft_config")} if "peft_config" in settings else {}
    return trl.DPOTrainer(
        model=model,
        args=_arguments(trl.DPOConfig, folder, bf16=False, **settings),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(),
        **given,
    )


def kto(folder: Path, model: nn.Module, rows: list[dict[str, Any]], **settings: Any) -> trl.KTOTrainer:
    return trl.KTOTrainer(
        model=model,
        args=_arguments(trl.KTOConfig, folder, bf16=False, **settings),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(),
    )


def logged(trainer: transformers.Trainer, key: str = "loss") -> list[float]:
    """What a trainer has logged, step by step."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def small(value: float) -> str:
    """A distance that is to be next to nothing."""
    return f"{value:.0e}" if value else "0"


def told(values: list[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)


def orpo(folder: Path, model: nn.Module, rows: list[dict[str, Any]], **settings: Any) -> transformers.Trainer:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    return ORPOTrainer(
        model=model,
        args=_arguments(ORPOConfig, folder, bf16=False, **settings),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(),
    )
