"""What is computed: packed forward passes, log-probabilities of rows, generation; and the memory that this takes."""

from trimtab.base.available_memory import PeakMemory, free_memory
from trimtab.engine.arena import ActivationArena
from trimtab.engine.check import check_packing, ensure_checked, ensure_exact
from trimtab.engine.decode import Answer, Ended, generate, stream_tokens
from trimtab.engine.forward import describe_layers, pack_divergences, pack_logprobs
from trimtab.engine.frozen_cache import FrozenLayerCache
from trimtab.engine.likeliest import pack_target_scores
from trimtab.engine.memory_plan import MemoryPlan, Recompute, Workload, plan_memory
from trimtab.engine.pack_cost import PackCost
from trimtab.engine.sampling import GREEDY, Generation, GrowingText, before_stop, possible_stop

__all__ = [
    "GREEDY", "ActivationArena", "Answer", "Ended", "FrozenLayerCache", "Generation", "GrowingText", "MemoryPlan", "PackCost", "PeakMemory",
    "Recompute", "Workload", "before_stop", "check_packing", "describe_layers", "ensure_checked", "ensure_exact", "free_memory",
    "generate", "pack_divergences", "pack_logprobs", "pack_target_scores", "plan_memory", "possible_stop", "stream_tokens",
]  # fmt: skip
