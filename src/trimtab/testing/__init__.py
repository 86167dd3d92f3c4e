"""A tiny random base model, to try a method, an objective or a loop without a download.

    import trimtab
    from trimtab.testing import tiny_base

    base = tiny_base()
    rows = trimtab.rows("train.jsonl", base)
    adapter = trimtab.attach(base.model, trimtab.LoRA(rank=4))
    losses = [step.loss for step in trimtab.fit(base, adapter, rows, lr=1e-2)]

`base.model.save_pretrained(folder)` and `base.tokenizer.save_pretrained(folder)` make it a folder that `trimtab.load` opens.
"""

from trimtab.testing.tiny import tiny_base, tiny_model, tiny_tokenizer

__all__ = ["tiny_base", "tiny_model", "tiny_tokenizer"]
