"""What is computed: packed attention, sequence log-probabilities, generation."""

from trimtab.engine.decode import generate, stream_tokens
from trimtab.engine.forward import check_packing, pack_logprobs
from trimtab.engine.memory import Memory, Recompute, plan_memory

__all__ = ["Memory", "Recompute", "check_packing", "generate", "pack_logprobs", "plan_memory", "stream_tokens"]
