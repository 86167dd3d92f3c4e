"""A whole run in one file: load a base model, train a LoRA on examples, evaluate it, save it, and ask it something.

    python examples/train_loop.py      # the demo's data and SmolLM2-135M-Instruct: about 5 minutes on two CPU cores
    python examples/train_loop.py --base ./my-model --data mine.jsonl --output my-adapter --epochs 3 --lr 1e-4

Everything here is `import trimtab`. To log, evaluate or stop differently, change the body of the loop.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import trimtab

DEMO = Path(__file__).parents[1] / "demo" / "train.jsonl"


def main(words: Sequence[str] | None = None) -> None:
    arguments = parse(words)
    if arguments.output.exists():
        raise SystemExit(f"{arguments.output} exists already: name a new folder with --output.")

    # A base is a frozen model together with its tokenizer and chat template.
    base = trimtab.load(arguments.base)

    # Each example becomes a row of tokens, in which the answer's tokens are the targets of the loss.
    # The last rows are held out: they say what the model has learned, rather than memorized.
    rows = trimtab.rows(arguments.data, base)
    if not 0 < arguments.held_out < len(rows):
        raise SystemExit(f"--held-out: expected 1 to {len(rows) - 1} of the {len(rows)} examples, got {arguments.held_out}.")
    training, held_out = rows[: -arguments.held_out], rows[-arguments.held_out :]
    print(f"{base.source}: {len(training)} training examples, {len(held_out)} held out")

    # The first held-out example is what the model is asked, before and after.
    start = held_out[0].target_indices[0]
    prompt, expected = held_out[0].ids[:start], held_out[0].ids[start:]
    answer_before = answer(base, prompt)
    loss_before = trimtab.score_loss(base, held_out).loss

    # The adapter is put on the model in place. It starts as a change of nothing: the model still is the base.
    adapter = trimtab.attach(base.model, trimtab.LoRA(rank=arguments.rank), seed=arguments.seed)
    count = sum(parameter.numel() for parameter in adapter.parameters().values())
    print(f"{count:,} trainable parameters; held-out loss {loss_before:.4f} before training")

    # `fit` takes one optimizer step each time around, in a new order every epoch, and warms up and decays the learning rate.
    settings = {"epochs": arguments.epochs, "lr": arguments.lr or "auto", "rows_per_step": arguments.rows_per_step}
    for step in trimtab.fit(base, adapter, training, trimtab.SFT(), seed=arguments.seed, **settings):
        speed = step.tokens / step.seconds
        print(f"step {step.number:4}  loss {step.loss:.4f}  learning rate {step.lr:.1e}  {speed:,.0f} tokens/s", flush=True)
        if step.number % arguments.evaluate_every == 0:
            print(f"step {step.number:4}  held-out loss {trimtab.score_loss(base, held_out).loss:.4f}", flush=True)

    # The folder holds the adapter alone, and PEFT loads it too. Without it, the model is the base again, bit for bit.
    trimtab.save_adapter(base, adapter, arguments.output)
    adapter.detach()

    # What was saved is what is measured: in another process, this is all that is needed to use it.
    trimtab.load_adapter(base, arguments.output)
    after = trimtab.score_loss(base, held_out)
    low, high = after.interval
    print(f"held-out loss {loss_before:.4f} before, {after.loss:.4f} after (95 % interval {low:.4f} to {high:.4f})")
    print(f"expected: {base.decode(expected)}\nbefore:   {answer_before}\nafter:    {answer(base, prompt)}")
    print(f"The adapter is in {arguments.output}; to talk to it: trimtab chat {arguments.output}")


def answer(base: trimtab.Base, prompt: list[int]) -> str:
    """The model's most likely answer to a prompt, by greedy decoding. For a question as text: `trimtab.answer`."""
    (ids,) = trimtab.generate(base.model, [prompt], base.stop_ids, max_new_tokens=64)
    return base.decode(ids).strip()


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--base", default="smollm2-135m-instruct", help="a folder, a GGUF file or a hub name (default: %(default)s)")
    add("--data", default=str(DEMO), help="examples: JSON, JSONL, CSV, TSV or Parquet (default: the demo's)")
    add("--output", type=Path, default=Path("runs/train_loop"), help="a new folder for the adapter (default: %(default)s)")
    add("--held-out", type=int, default=24, help="how many examples to evaluate on (default: %(default)s)")
    add("--rank", type=int, default=16, help="the LoRA's rank (default: %(default)s)")
    add("--epochs", type=float, default=1.0, help="how often each example is trained on (default: %(default)s)")
    add("--rows-per-step", type=int, default=8, help="the effective batch size, in examples (default: %(default)s)")
    add("--lr", type=float, help="the peak learning rate (default: the method's own)")
    add("--evaluate-every", type=int, default=20, help="steps between evaluations (default: %(default)s)")
    add("--seed", type=int, default=0, help="decides the adapter's first values and the order (default: %(default)s)")
    return parser.parse_args(words)


if __name__ == "__main__":
    try:
        main()
    except trimtab.TrimtabError as error:  # its message says what is wrong, where, and what to do
        sys.exit(f"train_loop: {error}")
