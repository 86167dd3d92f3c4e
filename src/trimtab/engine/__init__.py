"""What is computed: packed attention, sequence log-probabilities, generation."""

from trimtab.engine.decode import generate, stream_tokens
from trimtab.engine.forward import check_packing, pack_logprobs

__all__ = ["check_packing", "generate", "pack_logprobs", "stream_tokens"]
