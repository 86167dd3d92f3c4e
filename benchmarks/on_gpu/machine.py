"""The machine that is measured: its device, how it takes the time, and models of random weights on it."""

import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

SHAPES = {
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151_936},
    "7B": {"hidden_size": 3584, "intermediate_size": 18_944, "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152_064},
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 211},
}  # fmt: skip
"""Qwen2.5's."""
LAYERS = {"1.5B": 28, "7B": 28, "tiny": 2}


class Machine(NamedTuple):
    """What is measured on."""

    device: torch.device
    dtype: torch.dtype
    """Of bases."""
    tiny: bool
    until: float
    """By time.time(): when all has to be done."""
    out: Path

    @classmethod
    def found(cls, device: str | None, tiny: bool, until: float, out: Path) -> "Machine":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        chosen = torch.device(device) if device else accelerator or torch.device("cpu")
        return cls(chosen, torch.bfloat16, tiny, until, out)

    @property
    def left(self) -> float:
        """Seconds."""
        return self.until - time.time()

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def clear(self) -> None:
        """Free what a part has left."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def seconds(self, function: Callable[[], Any], tries: int = 5, budget: float = 1.0) -> float:
        """Of one call: the median of a few tries, each of as many calls as take a while together.

        On CUDA by the device's clock, behind other work: the host, which is slower than small kernels, gets ahead meanwhile.
        """
        function()
        self.wait()
        started = time.perf_counter()
        function()
        self.wait()
        took = time.perf_counter() - started
        calls = 1 if self.tiny else max(1, min(100, int(budget / tries / max(took, 1e-6))))
        measure = self._by_device if self.cuda else self._by_host
        return statistics.median(measure(function, calls) for _ in range(1 if self.tiny else tries))

    def _by_host(self, function: Callable[[], Any], calls: int) -> float:
        started = time.perf_counter()
        for _ in range(calls):
            function()
        self.wait()
        return (time.perf_counter() - started) / calls

    def _by_device(self, function: Callable[[], Any], calls: int) -> float:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(min(100_000_000, 400_000 * calls))  # cycles: about 0.2 ms a call
        first.record()
        for _ in range(calls):
            function()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3 / calls

    def random(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(*shape, device=self.device, dtype=dtype or self.dtype)

    def peak(self) -> dict[str, float]:
        """The most memory since `clear`, in GB."""
        if not self.cuda:
            return {}
        held = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return {"allocated_gb": held[0] / 1e9, "reserved_gb": held[1] / 1e9}

    def size(self, full: int, tiny: int) -> int:
        return tiny if self.tiny else full


def tried(function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What one case of a part gives, or why it fails. Raises what breaks the device."""
    try:
        return function()
    except Exception as error:  # whatever it is, the other cases go on
        if "CUDA error" in str(error):
            raise
        return {"error": f"{type(error).__name__}: {error}"[:500]}


def made(machine: Machine, name: str, layers: int | None = None, **settings: Any) -> Any:
    """A Qwen2 of this size with random weights, in the base's dtype."""
    import transformers

    shape = SHAPES["tiny" if machine.tiny else name]
    known = {"max_position_embeddings": 32_768, "tie_word_embeddings": name == "1.5B", "use_cache": False}
    depth = layers or LAYERS["tiny" if machine.tiny else name]
    config = transformers.Qwen2Config(**{**shape, **known, "num_hidden_layers": depth, **settings})
    torch.manual_seed(0)
    with torch.device(machine.device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=machine.dtype)
    return model.eval().requires_grad_(False)
