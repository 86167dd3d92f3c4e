"""The tables of docs/scale.md that follow from `costs` and `shares`."""

from functools import cache

from at_scale.costs import (
    CONFIGS,
    H100,
    ONE_CARD,
    RANK,
    Engine,
    Shape,
    all_reduce,
    exposed_gathers,
    full_bytes,
    gather,
    kept_by_a_layer,
    level_that_fits,
    memory,
    shape_of,
    step_time,
    work,
)
from at_scale.shares import Shares, made_up_lengths, mean_shares
from trimtab.engine.memory_plan import LEVELS
from trimtab.engine.recompute import Level

GPUS = (1, 2, 4, 8, 16, 32, 64)
TOKENS, PACK = 16_384, 4_096
"""Of a step, a GPU; and of a pack, at most."""
LEARNED = 0.5
"""The share of tokens that are predicted."""
MEAN, ROW = 177, 309
"""Tokens of an example on average (`made_up_lengths`), and of the one that a token is in."""
ENGINES: tuple[Engine, ...] = ("ddp", "zero2", "fsdp", "zero3", "nf4")
LARGEST = 32_768
"""Tokens of a pack, at most (`engine/memory_trial.py`)."""
FULL: tuple[Engine, ...] = ("ddp", "zero2", "fsdp")
AGAIN: dict[Level, str] = {"none": "", "mlp": ", MLPs again", "full": ", all again"}


def tables() -> dict[str, str]:
    """By the marks in docs/scale.md between which each stands."""
    made = {
        "models": models,
        "memory": memories,
        "full": trained_whole,
        "sent": sent,
        "steps": steps,
        "idle": idle,
        "small-steps": small_steps,
    }
    return {f"paper: {name}": table() for name, table in made.items()} | {"paper: assumptions": assumptions()}


def assumptions() -> str:
    """What the tables assume, with the numbers that the code has."""
    on = H100
    lines = [
        f"**Devices**: H100 SXM, {on.memory / 1e9:.0f} GB, of which a plan takes {on.planned:.0%}; {on.besides / 1e9:.1f} GB go to CUDA's "
        f"context, NCCL's buffers and what the allocator loses. Products reach {on.flops / 1e12:.0f} TFLOP/s in bfloat16 (45 % of the "
        f"peak), reads {on.reads / 1e12:.1f} TB/s (90 %).",
        f"**Connections**: {on.node} GPUs a node, which send {on.within / 1e9:.0f} GB/s in each direction (80 % of NVLink); between nodes "
        f"{on.between / 1e9:.0f} GB/s a node (80 % of 8 cards of 400 Gb/s), in brackets {ONE_CARD.between / 1e9:.0f} GB/s (one card). A "
        f"collective begins after {on.delay * 1e6:.0f} µs, between nodes after {2 * on.delay * 1e6:.0f} µs.",
        f"**Training**: LoRA of rank {RANK} on all linear layers, AdamW; the base in bfloat16 (nf4: 4 bits), the adapter in float32. "
        f"Layers by hand, flash attention. {LEARNED:.0%} of the tokens are predicted.",
        f"**Examples**: lognormal, median 134 tokens, mean {MEAN}, no prefix in common; a token's own example has {ROW} on average. "
        f"{TOKENS:,} tokens a GPU and step, about {TOKENS / MEAN:.0f} examples, in packs of at most {PACK:,}.",
        "**Work**: a weight costs 2 FLOP a token forward and 2 backward, for it has no gradient, and 2 more where it is computed again; one "
        "of the adapter 6; one of the head 4, for tokens that predict.",
        "**Sending**: the adapter's gradients are added when the last pack is done, and nothing hides that. Gathers of `fsdp` are hidden "
        "behind the layer before, as far as computing takes as long. How much they slow it down is not counted.",
    ]
    return "".join(f"* {line}\n" for line in lines)


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f}"


def _table(head: list[str], left: int, rows: list[list[str]]) -> str:
    """As Markdown, of which so many columns, the first ones, are words."""
    rule = "|---" * left + "|--:" * (len(head) - left) + "|"
    return "\n".join([f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def models() -> str:
    """What follows from a model's shape alone."""
    head = ["model", "parameters", "base, bf16", "of it layers", "LoRA", "its gradients", "with optimizer"]
    head += ["kept a token", "MLPs again", "all again", "GFLOP a token", "tokens/s a GPU", "all again"]
    rows = []
    for name in CONFIGS:
        shape = shape_of(name)
        row = [name, f"{shape.total / 1e9:.2f} G", f"{_gb(2 * shape.total)} GB", f"{_gb(2 * shape.layers * shape.layer)} GB"]
        row += [f"{shape.adapter / 1e6:.1f} M", f"{4 * shape.adapter / 1e6:.0f} MB", f"{_gb(16 * shape.adapter)} GB"]
        row += [f"{shape.layers * kept_by_a_layer(shape, level) / 1e6:.2f} MB" for level in LEVELS]
        flop, again = (work(shape, level, LEARNED, ROW) for level in ("none", "full"))
        rows.append([*row, f"{flop / 1e9:.1f}", f"{H100.flops / flop:,.0f}", f"{H100.flops / again:,.0f}"])
    return _table(head, 1, rows)


def memories() -> str:
    """With as little computed again as fits."""
    rows = []
    for name in CONFIGS:
        shape = shape_of(name)
        for processes in (1, 2, 4, 8, 16, 64):
            cells = [_memory(shape, engine, processes) for engine in ENGINES]
            rows.append([name, str(processes), *cells])
    return _table(["model", "GPUs", *ENGINES[:-1], "nf4, ddp"], 1, rows)


def _memory(shape: Shape, engine: Engine, processes: int) -> str:
    if processes == 1 and engine not in ("ddp", "nf4"):
        return "–"
    level = level_that_fits(shape, engine, processes, PACK, LEARNED)
    needed = memory(shape, engine, processes, PACK, level or "full", LEARNED) / 1e9
    return f"~~{needed:.0f}~~" if level is None else f"{needed:.1f}{AGAIN[level]}"


def trained_whole() -> str:
    """Weights, gradients and optimizer of `method: full`, GB: a float32 copy of every weight is trained, beside the base."""
    rows = []
    for name in list(CONFIGS)[:2]:
        for processes in (1, 4, 8, 64):
            cells = [f"{full_bytes(shape_of(name), engine, processes) / 1e9:.0f}" for engine in FULL]
            rows.append([name, str(processes), *([cells[0], "–", "–"] if processes == 1 else cells)])
    return _table(["model", "GPUs", "ddp", "zero1, zero2", "fsdp"], 1, rows)


def sent() -> str:
    """Bytes and seconds of a step."""
    head = ["model", "GPUs", "ddp: adapter's gradients, a step", "of a step's time"]
    head += ["fsdp: layers, a pack, within a node", "of them waited for", "zero3: layers, a pack"]
    rows = []
    for name in CONFIGS:
        shape = shape_of(name)
        layers = 2.0 * shape.layers * shape.layer
        for processes in (2, 8, 16, 64):
            size, group = 4.0 * shape.adapter, min(processes, H100.node)
            once, slow = all_reduce(size, processes), all_reduce(size, processes, ONE_CARD)
            level = level_that_fits(shape, "fsdp", processes, PACK, LEARNED) or "full"
            computing = TOKENS * work(shape, level, LEARNED, ROW) / H100.flops
            whole, whole_slow = 2 * gather(layers, processes), 2 * gather(layers, processes, ONE_CARD)
            brackets = processes > H100.node
            rows.append([
                name, str(processes),
                f"{2 * (processes - 1) / processes * size / 1e6:.0f} MB, {1e3 * once:.1f} ms" + (f" ({1e3 * slow:.1f})" if brackets else ""),
                f"{once / computing:.2%}" + (f" ({slow / computing:.2%})" if brackets else ""),
                f"{2 * (group - 1) / group * layers / 1e9:.1f} GB, {1e3 * 2 * gather(layers, group):.0f} ms",
                f"{1e3 * exposed_gathers(shape, PACK, processes):.1f} ms",
                f"{1e3 * whole:.0f} ms" + (f" ({1e3 * whole_slow:,.0f})" if brackets else ""),
            ])  # fmt: skip
    return _table(head, 1, rows)


@cache
def _shares(rows: int, processes: int, most: int, trials: int, even: bool = True) -> Shares:
    """Of steps of made-up lengths, in packs of at most so many tokens.

    Pairs of tokens that attend to each other weigh as in the 7B model; in others hardly differently.
    """
    shape = shape_of("Qwen2.5-7B")

    def cost(length: int) -> float:
        return length * work(shape, "none", LEARNED, length)

    return mean_shares([made_up_lengths(rows, seed) for seed in range(trials)], processes, most, cost, even=even)


def steps() -> str:
    """As many tokens a GPU, whatever the number of GPUs."""
    rows = []
    for name in CONFIGS:
        shape = shape_of(name)
        for processes in GPUS:
            shares = _shares(round(TOKENS * processes / MEAN), processes, PACK, 2 if processes > 8 else 10)
            pack = int(TOKENS * processes / shares.packs)
            for engine in _worth_it(shape, processes):
                level = level_that_fits(shape, engine, processes, PACK, LEARNED)
                assert level is not None
                time = step_time(shape, engine, processes, TOKENS, pack, level, LEARNED, ROW, shares.busy)
                words = f"{'nf4, ddp' if engine == 'nf4' else engine}{AGAIN[level]}"
                parts = [f"{time.waiting / time.total:.1%}", f"{time.sending / time.total:.2%}", f"{time.total:.2f} s"]
                speed = f"{processes * TOKENS / time.total:,.0f}"
                rows.append([name, words, str(processes), f"{time.computing:.2f} s", *parts, speed])
    head = ["model", "engine", "GPUs", "computing", "waiting", "sending", "step", "tokens/s, all"]
    return _table(head, 2, rows)


def _worth_it(shape: Shape, processes: int) -> list[Engine]:
    """Engines that fit: ddp, or what stands in for it where it does not fit."""

    def fits(engine: Engine) -> bool:
        return level_that_fits(shape, engine, processes, PACK, LEARNED) is not None

    if fits("ddp"):
        return ["ddp"]
    others: tuple[Engine, ...] = ("fsdp", "nf4") if processes > 1 else ("nf4",)
    return [engine for engine in others if fits(engine)]


def idle() -> str:
    """By how packs are cut."""
    rows = []
    for count in (16, 64, 256, 1024):
        for processes in (2, 4, 8, 16, 64):
            plain, even = (_shares(count, processes, 1024, 10, is_even) for is_even in (False, True))
            cells = [f"{1 - shares.busy:.0%}" for shares in (plain, even)]
            rows.append([str(count), f"{count * MEAN:,}", str(processes), *cells, f"{even.packs:.0f}", f"{even.empty:.0f}"])
    head = ["examples a step", "tokens", "processes", "idle, packs of 1,024", "idle, packs for so many processes", "packs"]
    return _table([*head, "processes without one"], 0, rows)


def small_steps() -> str:
    """The same step on more GPUs: how many times as fast."""
    rows, worlds = [], (2, 4, 8, 16, 64)
    for count in (64, 256, 1024):
        for name in ("Qwen2.5-1.5B", "Qwen2.5-7B"):
            alone, *others = (_small_step(shape_of(name), count, processes) for processes in (1, *worlds))
            rows.append([str(count), name, f"{alone:.2f} s", *(f"{alone / other:.1f}×" for other in others)])
    return _table(["examples a step", "model", "1 GPU", *(f"{processes} GPUs" for processes in worlds)], 2, rows)


def _small_step(shape: Shape, count: int, processes: int) -> float:
    shares = _shares(count, processes, LARGEST, 10)
    pack = count * MEAN / shares.packs
    slower = max(1.0, reading_tokens() / pack)  # a pass reads all weights, however few its tokens are
    tokens = count * MEAN / processes * slower
    return step_time(shape, "ddp", processes, tokens, int(pack), "none", LEARNED, ROW, shares.busy).total


def reading_tokens() -> float:
    """Tokens of a pack below which a pass takes as long as reading the weights, however few they are."""
    return H100.flops / H100.reads
