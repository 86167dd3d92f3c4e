"""The Python door: text in pieces, and steps that are made when they are taken."""

import random

import pytest
import tokenizers
import transformers
from families import random_rows, tiny
from tokenizers import decoders, models, pre_tokenizers, trainers

from trimtab import api
from trimtab.base import Base
from trimtab.core.errors import DataError
from trimtab.data.example import TokenRow
from trimtab.engine import GrowingText
from trimtab.methods import attach
from trimtab.methods.lora import LoRA
from trimtab.train import steps

TEXTS = ["  Grüße, 🙂🙂 and  two spaces.\n\n\tTab ", "価格は€100です", "a", " ", "e\u0301 😀\u200d👩 end"]


def byte_level():
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(["two spaces and two tabs"], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<s>", pad_token="<s>")


def pieces_of_words():
    """As Llama 2's and Gemma's: ▁ for a space, of which a text's first goes, and bytes for what there is no piece for."""
    vocabulary = {"<unk>": 0, "<s>": 1, **{f"<0x{n:02X}>": n + 2 for n in range(256)}}
    for piece in ("▁", "▁two", "two", "▁sp", "aces", "a", "n", "d", "e", ".", "▁and"):
        vocabulary[piece] = len(vocabulary)
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<s>", pad_token="<s>")


def base_of(tokenizer):
    base = Base(tiny("llama"))
    base.tokenizer = tokenizer
    return base


def pieces(base, ids):
    text = GrowingText(base.decode)
    return [*map(text.add, ids), text.rest()]


@pytest.mark.parametrize("make", [byte_level, pieces_of_words])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_the_text_and_no_character_is_cut(make, text):
    base = base_of(make())
    special = base.tokenizer.eos_token_id
    ids = base.tokenizer(text, add_special_tokens=False).input_ids
    for given in (ids, [special, *ids], [i for one in ids for i in (one, special)]):
        found = list(pieces(base, given))
        assert "".join(found) == base.decode(given)
        assert not any("\ufffd" in piece for piece in found)


def test_pieces_of_any_tokens_are_their_text():
    base, draw = base_of(byte_level()), random.Random(0)
    for _ in range(200):
        given = draw.choices(range(1, 280), k=draw.randint(0, 12))  # most are no whole characters
        assert "".join(pieces(base, given)) == base.decode(given)


def test_a_long_answer_is_not_decoded_again_for_each_token(monkeypatch):
    base, decoded = base_of(byte_level()), []
    real = base.decode
    monkeypatch.setattr(base, "decode", lambda ids: decoded.append(len(ids)) or real(ids))
    ids = base.tokenizer("two spaces, tabs and €. " * 40, add_special_tokens=False).input_ids
    assert "".join(pieces(base, ids)) == real(ids)
    assert sum(decoded) < 8 * len(ids)


def fit(rows, **settings):
    base = Base(tiny("llama"))
    return api.fit(base, attach(base.model, LoRA(rank=2)), rows, lr=1e-3, **settings)


def test_packs_are_made_when_their_step_is_taken(monkeypatch):
    made = []
    real = steps.pack_all
    monkeypatch.setattr(steps, "pack_all", lambda rows, tokens, **more: made.append(len(rows)) or real(rows, tokens, **more))
    rows = [TokenRow(ids, [2, 3], f"row:{n}", 6) for n, ids in enumerate(random_rows(*[6] * 6))]
    going = fit(rows, epochs=1000, rows_per_step=2)
    next(going)
    next(going)
    assert made == [2] * (steps.FULLEST + 1 + 2)  # those that memory is planned for come before


def test_no_rows_are_refused():
    with pytest.raises(DataError, match="nothing to train on"):
        next(fit([], epochs=1))
