"""What is computed: packed attention, sequence log-probabilities, generation."""

from trimtab.engine.arena import ActivationArena
from trimtab.engine.available_memory import Peak, free_memory
from trimtab.engine.decode import Answer, Ended, generate, stream_tokens
from trimtab.engine.forward import check_packing, pack_divergences, pack_logprobs
from trimtab.engine.frozen_cache import FrozenLayerCache
from trimtab.engine.memory_plan import Memory, Recompute, Work, plan_memory

__all__ = [
    "ActivationArena", "Answer", "Ended", "FrozenLayerCache", "Memory", "Peak", "Recompute", "Work", "check_packing", "free_memory", "generate",
    "pack_divergences",
    "pack_logprobs", "plan_memory", "stream_tokens",
]  # fmt: skip
