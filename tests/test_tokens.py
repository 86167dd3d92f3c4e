"""Trainable tokens: rows of the embeddings (and of the head) by an independent formula, with PEFT, and the life of new tokens."""

import copy
import json

import pytest
import torch
import transformers
from families import FAMILIES, logprob_alone, perturb, random_rows, tiny
from templates import CHATML, base_of, bytes_tokenizer, pieces_tokenizer

import trimtab
from trimtab.base import Base
from trimtab.core.errors import ArtifactError, DataError, NotMergeable, RecipeError
from trimtab.data import Conversation, SourceReport, pack_flat, tokenize_examples
from trimtab.data.example import TokenRow
from trimtab.deploy import load_adapter, merge, save_adapter
from trimtab.engine import generate, pack_logprobs
from trimtab.methods import active, attach
from trimtab.methods.lora import LoRA
from trimtab.methods.tokens import Tokens
from trimtab.run.recipe import Recipe

ROWS = random_rows(9, 7)
IDS = torch.tensor(random_rows(11, 11))
SOME = IDS[0, :3].tolist()


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def with_rows(model, ids, rows, head_rows=None):
    """The reference: a copy of the model whose tables hold these rows, resized by Transformers where they have fewer."""
    changed = copy.deepcopy(model)
    size = max(len(changed.get_input_embeddings().weight), max(ids) + 1)
    changed.resize_token_embeddings(size, mean_resizing=False)
    with torch.no_grad():
        changed.get_input_embeddings().weight[ids] = rows.to(changed.dtype)
        if head_rows is not None:
            changed.get_output_embeddings().weight[ids[-len(head_rows) :]] = head_rows.to(changed.dtype)
    return changed


def rows_of(adapter):
    return [layer.rows.detach() for layer in adapter.layers.values()]


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_model_with_those_rows_of_its_tables_in_their_place(family, head):
    model, tied = tiny(family), tiny(family).config.tie_word_embeddings
    adapter = attach(model, Tokens(tokens=SOME, head=head))
    perturb(adapter.parameters())
    rows, *head_rows = rows_of(adapter)
    assert len(adapter.parameters()) == (2 if head and not tied else 1)
    expected = with_rows(tiny(family), SOME, rows, head_rows[0] if head_rows else None)
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-5, atol=1e-5)
    packed = pack_logprobs(model, pack_flat(TokenRow(ids, list(range(1, len(ids))), "row") for ids in ROWS))
    alone = [logprob_alone(expected, ids, list(range(1, len(ids)))) for ids in ROWS]
    torch.testing.assert_close(packed.detach(), torch.stack(alone), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma3", "gpt2"])
def test_its_gradient_is_that_of_those_rows_in_the_full_tables(family):
    """In float64, against the gradient of whole tables that Transformers' own model has."""
    model = tiny(family, torch.float64)
    adapter = attach(model, Tokens(tokens=SOME, head=True))
    perturb(adapter.parameters())
    full = with_rows(tiny(family, torch.float64), SOME, *rows_of(adapter)).requires_grad_(True)
    for one in (model, full):
        one(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    tables = [full.get_input_embeddings().weight, full.get_output_embeddings().weight]
    for parameter, table in zip(adapter.parameters().values(), tables, strict=False):
        torch.testing.assert_close(parameter.grad, table.grad[SOME], rtol=1e-5, atol=1e-7)  # norms are float32 in Transformers


# PEFT

peft = pytest.importorskip("peft")
PEFTS = pytest.mark.filterwarnings("ignore::FutureWarning")


@PEFTS
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_ours_and_we_load_pefts(family, head, tmp_path):
    base = Base(tiny(family))
    adapter = attach(base.model, Tokens(tokens=SOME, head=head))
    perturb(adapter.parameters())
    save_adapter(base, adapter, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(tiny(family), tmp_path / "ours")
    torch.testing.assert_close(logits(theirs), logits(base.model), rtol=1e-5, atol=1e-5)
    assert (logits(base.model) - logits(tiny(family))).abs().max() > 1e-2

    both = head and not tiny(family).config.tie_word_embeddings
    config = peft.TrainableTokensConfig(
        token_indices=SOME, **({"target_modules": ["embed_tokens", "lm_head"]} if both else {}), task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(tiny(family), config).eval()
    perturb({n: p for n, p in theirs.named_parameters() if "trainable_tokens" in n}, seed=1)
    theirs.save_pretrained(tmp_path / "theirs")
    again = Base(tiny(family))
    loaded = load_adapter(again, tmp_path / "theirs")
    assert loaded.method.tokens == tuple(SOME)
    torch.testing.assert_close(logits(again.model), logits(theirs), rtol=1e-5, atol=1e-5)


@PEFTS
@pytest.mark.parametrize(
    ("targets", "change", "message"),
    [
        (["lm_head"], {}, r"embed_tokens\.rows: missing"),
        (["embed_tokens"], {"token_indices": SOME[:2]}, r"embed_tokens\.rows: has shape \(3, 32\), expected \(2, 32\)"),
        (["embed_tokens"], {"token_indices": [5, 5, 7]}, "names token 5 more than once"),
        (["embed_tokens"], {"token_indices": [5, 7, 97]}, "97 is no token"),
    ],
)
def test_pefts_that_do_not_fit_are_refused(targets, change, message, tmp_path):
    config = peft.TrainableTokensConfig(token_indices=SOME, target_modules=targets)
    peft.get_peft_model(tiny("llama"), config).save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ArtifactError, match=message):
        load_adapter(Base(tiny("llama")), tmp_path / "theirs")


# Words


@pytest.fixture
def base():
    """A chat model with tied tables, as large as its vocabulary."""
    return chat_base()


def chat_base(tied=True, rows=0, family=transformers.LlamaForCausalLM, tokenizer=None, **settings):
    wrapped = base_of(
        tokenizer or bytes_tokenizer(("<|endoftext|>", "<|im_start|>", "<|im_end|>")), CHATML, eos_token="<|im_end|>"
    )
    config = family.config_class(
        vocab_size=len(wrapped.tokenizer) + rows, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied, bos_token_id=None, eos_token_id=None,
        pad_token_id=None, **settings,
    )  # fmt: skip
    torch.manual_seed(0)
    model = family(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.2)
    return Base(model, wrapped.tokenizer, "chat")


THINK = Tokens(tokens=["<|im_start|>", " is"], new=["<think>", "</think>"])
TALK = Conversation(
    ({"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "<think>hello</think> It is 4."}), "row"
)


def thinking(base, name="default", method=THINK):
    base.add_tokens(method.new_tokens)
    adapter = attach(base.model, method, name=name, sample=trimtab.sample(base, []))
    perturb(adapter.parameters())
    return adapter


def encoded(base, talk=TALK):
    report = SourceReport(("test",))
    (row,) = tokenize_examples([talk], base, report)
    assert not report.rejected
    return row


def test_words_are_tokens_of_the_tokenizer(base):
    adapter = attach(base.model, Tokens(tokens=["<|im_start|>", " is", 7]), sample=trimtab.sample(base, []))
    assert adapter.method.tokens == (base.tokenizer.convert_tokens_to_ids("<|im_start|>"), *base.encode([" is"])[0].ids, 7)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"tokens": ["<think>"]}, r"'<think>' is 7 tokens of this tokenizer, and must be one: put it under new\."),
        ({"tokens": ["a", "a"]}, "more than once"),
        ({"tokens": [391]}, "391 is no token: this model has 391, numbered from 0"),
        ({"new": ["<think>"]}, r"'<think>' is 7 tokens .* call base\.add_tokens"),
    ],
)
def test_words_that_are_no_token_are_refused_and_the_model_is_left_as_it_was(method, message, base):
    keys = list(base.model.state_dict())
    with pytest.raises(RecipeError, match=message):
        attach(base.model, Tokens(**method), sample=trimtab.sample(base, []))
    assert list(base.model.state_dict()) == keys


def test_what_cannot_be_is_refused_where_it_is_written(base):
    for values in ({}, {"tokens": []}, {"tokens": [-1]}, {"tokens": [True]}, {"new": [""]}, {"new": [3]}):
        with pytest.raises(RecipeError):
            Tokens(**values)
    with pytest.raises(RecipeError, match="'<think>' needs a tokenizer"):
        attach(base.model, Tokens(new=["<think>"]))
    with pytest.raises(RecipeError, match=r"'<\|im_end\|>' is a token of chat already"):
        base.add_tokens(["<|im_end|>"])
    with pytest.raises(RecipeError, match="no tokenizer"):
        Base(tiny("llama")).add_tokens(["<think>"])


# New tokens


def test_the_tokenizer_reads_and_writes_them_and_the_base_is_the_base_as_before(base):
    before, own = base.fingerprint, base.tokenizer
    plain = base.encode(["<think>"])[0].ids
    base.add_tokens(["<think>", "</think>"])
    base.add_tokens(["</think>"])
    assert base.added_tokens == {"<think>": 391, "</think>": 392}
    assert base.encode(["a<think>b"])[0].ids[1] == 391
    assert base.decode([391, 392]) == "<think></think>"
    assert base.original_ids("<think>") == plain == own("<think>")["input_ids"]
    assert base.control_tokens == ("<|endoftext|>", "<|im_end|>", "<|im_start|>")
    base.__dict__.pop("fingerprint")
    assert base.fingerprint == before


@pytest.mark.parametrize("tokenizer", [bytes_tokenizer, pieces_tokenizer])
def test_rows_with_them_are_learned_as_one_token_each(tokenizer):
    base = chat_base(tokenizer=tokenizer(("<|endoftext|>", "<|im_start|>", "<|im_end|>")))
    thinking(base, method=Tokens(new=THINK.new_tokens))
    row = encoded(base)
    think, end = base.added_tokens["<think>"], base.added_tokens["</think>"]
    assert {think, end} <= {row.ids[t] for t in row.target_indices}
    assert base.decode([row.ids[t] for t in row.target_indices]) == "<think>hello</think> It is 4."


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 64])
def test_it_is_the_model_that_transformers_resizes(tied, rows):
    """Also where the tables have room for one of the new tokens, or for both, as Qwen's have."""
    base = chat_base(tied, rows)
    plain = copy.deepcopy(base.model)
    adapter = thinking(base)
    ids = [*adapter.method.tokens, *adapter.method.new.values()]
    assert ids[2:] == [391, 392]  # </think>, <think>
    expected = with_rows(plain, ids, *rows_of(adapter))
    row = encoded(base)
    assert logits(base.model, torch.tensor([row.ids])).shape[-1] == max(391 + rows, 393)
    torch.testing.assert_close(logits(base.model, torch.tensor([row.ids])), logits(expected, torch.tensor([row.ids])))
    packed = pack_logprobs(base.model, pack_flat([row, row]))
    torch.testing.assert_close(packed[1].detach(), logprob_alone(expected, row.ids, row.target_indices), rtol=1e-5, atol=1e-5)
    packed.sum().backward()
    assert all((p.grad.abs().sum(1) > 0).all() for p in adapter.parameters().values())
    adapter.detach()
    assert torch.equal(logits(base.model, IDS), logits(plain, IDS))


def test_they_start_as_the_mean_of_what_they_were():
    for base in (chat_base(), chat_base(tied=False)):
        base.add_tokens(THINK.new_tokens)
        adapter = attach(base.model, THINK, sample=trimtab.sample(base, []))
        pieces = [base.encode([piece])[0].ids[0] for piece in "<think>"]
        for layer in adapter.layers.values():
            torch.testing.assert_close(layer.rows[-1], layer.base.weight[pieces].mean(0))


def test_they_can_be_said(base):
    adapter = thinking(base)
    think = base.added_tokens["<think>"]
    with torch.no_grad():
        prompt = encoded(base).ids[:9]
        hidden = base.model.base_model(input_ids=torch.tensor([prompt]), use_cache=False).last_hidden_state[0, -1]
        adapter.layers["lm_head"].rows[-1] = hidden * 9  # so that it is by far the likeliest next
    (answer,) = generate(base.model, [prompt], [], max_new_tokens=5)
    assert answer[0] == think
    for at, token in enumerate(answer):
        assert token == int(logits(base.model, torch.tensor([prompt + answer[:at]]))[0, -1].argmax())
    assert base.decode(answer).startswith("<think>")


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_folder_carries_them_to_a_fresh_base(tied, tmp_path):
    base = chat_base(tied)
    thinking(base)
    save_adapter(base, trimtab.adapters(base.model)["default"], tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "TRIMTAB_TOKENS"  # PEFT has no rows for ids beyond the model's
    fresh = chat_base(tied)
    loaded = load_adapter(fresh, tmp_path / "adapter")
    assert loaded.method.new == {"</think>": 391, "<think>": 392}
    row = encoded(fresh)
    assert row == encoded(base)
    expected = logits(base.model, torch.tensor([row.ids]))
    assert torch.equal(logits(fresh.model, torch.tensor([row.ids])), expected)
    other = chat_base(tied)
    other.add_tokens(["<other>"])  # which takes the first id; what counts is the text
    assert load_adapter(other, tmp_path / "adapter").method.new == {"</think>": 392, "<think>": 393}
    shifted = logits(other.model, torch.tensor([encoded(other).ids]))
    torch.testing.assert_close(shifted[..., [*range(391), 392, 393]], expected)
    assert (shifted[..., 391] == -torch.inf).all()


def test_a_base_whose_own_tokenizer_has_them_is_another_base(base, tmp_path):
    adapter = thinking(base)
    save_adapter(base, adapter, tmp_path / "adapter")
    other = base_of(bytes_tokenizer(("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>")), CHATML, eos_token="<|im_end|>")
    with pytest.raises(ArtifactError, match="different tokenizer"):
        load_adapter(Base(chat_base().model, other.tokenizer), tmp_path / "adapter")


def test_a_folder_that_does_not_fit_leaves_the_tokenizer_as_it_was(base, tmp_path):
    adapter = thinking(base)
    with torch.no_grad():
        adapter.layers["lm_head"].rows[0, 0] = torch.nan
    save_adapter(base, adapter, tmp_path / "adapter")
    fresh = chat_base()
    with pytest.raises(ArtifactError, match="not finite"):
        load_adapter(fresh, tmp_path / "adapter")
    assert fresh.added_tokens == {}
    assert list(fresh.model.state_dict()) == list(chat_base().model.state_dict())


@pytest.mark.parametrize(("tied", "rows"), [(True, 0), (False, 0), (False, 64)])
def test_merged_it_is_a_larger_model_for_transformers_alone(tied, rows, tmp_path):
    base = chat_base(tied, rows)
    adapter = thinking(base)
    done = merge(base, adapter, tmp_path / "merged")
    assert done.max_logit_difference < 1e-4 * done.logit_scale
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    size = max(391 + rows, 393)
    assert (plain.config.vocab_size, plain.lm_head.out_features) == (size, size)
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) == tied
    assert sum(f.stat().st_size for f in (tmp_path / "merged").glob("*.safetensors")) < 1.1 * 4 * plain.num_parameters()
    row = encoded(base)
    text = base.template.render(TALK.messages)
    assert tokenizer(text)["input_ids"][: len(row.ids)] == row.ids
    torch.testing.assert_close(logits(plain, torch.tensor([row.ids])), logits(base.model, torch.tensor([row.ids])))


def test_without_their_adapter_a_text_with_them_is_refused(base):
    adapter = thinking(base)
    row = encoded(base)
    for within in (adapter.disabled(), active(base.model)):
        with within, pytest.raises(DataError, match=r"holds token 39[12], which an adapter added .* does not act here"):
            pack_logprobs(base.model, pack_flat([row]))
    with pytest.raises(DataError, match="does not act here"):
        pack_logprobs(base.model, pack_flat([row, row]), owners=["default", None])


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_adapters_with_and_without_new_tokens_share_a_batch(softcap):
    settings = {"final_logit_softcapping": softcap, "head_dim": 8} if softcap else {}
    base = chat_base(family=transformers.Gemma2ForCausalLM if softcap else transformers.LlamaForCausalLM, **settings)
    thinking(base, "thinking")
    thinking(base, "others", Tokens(new=["<other>"], tokens=[5]))
    perturb(attach(base.model, LoRA(rank=2, targets=["q_proj", "lm_head"]), name="lora").parameters())
    plain = encoded(
        base, Conversation(({"role": "user", "content": "hello"}, {"role": "assistant", "content": "It is"}), "row")
    )
    other = encoded(
        base, Conversation(({"role": "user", "content": "<other>"}, {"role": "assistant", "content": "<other>"}), "row")
    )
    rows, owners = [encoded(base), plain, plain, other], ["thinking", None, "lora", "others"]
    with torch.no_grad():
        together = pack_logprobs(base.model, pack_flat(rows), owners=owners)
        for one, row, owner in zip(together, rows, owners, strict=True):
            with active(base.model, *[owner] if owner else []):
                torch.testing.assert_close(pack_logprobs(base.model, pack_flat([row]))[0], one, rtol=1e-5, atol=1e-4)
    prompts = [row.ids[:5] for row in rows]
    answers = generate(base.model, prompts, [], max_new_tokens=6, owners=owners)
    for prompt, answer, owner in zip(prompts, answers, owners, strict=True):
        with active(base.model, *[owner] if owner else []):
            assert generate(base.model, [prompt], [], max_new_tokens=6) == [answer]


def test_only_an_adapter_that_brought_all_of_them_is_merged(base, tmp_path):
    adapter = thinking(base)
    base.add_tokens(["<other>"])
    with pytest.raises(NotMergeable, match="Another adapter has added '<other>'"):
        merge(base, adapter, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_with_them_repeats_itself():
    recipe = Recipe.parse({"data": {"train": ["x"]}, "method": {"name": "tokens", "new": ["<b>", "<a>"]}})
    assert recipe.plain()["method"]["new"] == ["<a>", "<b>"]
    assert Recipe.parse(recipe.plain()) == recipe
    bound = Tokens(new={"<b>": 7, "<a>": 8})
    assert (bound.plain()["new"], bound.new_tokens, bound.ids) == ({"<a>": 8, "<b>": 7}, ("<a>", "<b>"), (8, 7))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_run_adds_them_before_it_reads_its_data_and_its_adapter_answers_with_them(tmp_path):
    base = chat_base()
    base.model.save_pretrained(tmp_path / "model")
    base.tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"What is {n}?", "completion": f"<think>{n}</think> It is {n}."} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = Recipe.parse(
        {
            "model": {"name": str(tmp_path / "model"), "device": "cpu"},
            "data": {"train": str(tmp_path / "rows.jsonl"), "eval": 2},
            "method": {"name": "tokens", "new": ["<think>", "</think>"]},
            "train": {"epochs": 20.0, "lr": 0.05, "rows_per_step": 6},
            "output": str(tmp_path / "run"),
            "certify": False,
        }
    )
    run = trimtab.run_recipe(recipe)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "eval"]
    assert next(line["step"] for line in lines if line["kind"] == "eval") == 0
    assert losses[-1] < 0.9 * losses[0]
    assert run.record["trainable_parameters"] == 2 * 32
    fresh = Base.load(str(tmp_path / "model"))
    load_adapter(fresh, tmp_path / "run" / "adapter")
    assert fresh.added_tokens.keys() == {"<think>", "</think>"}
