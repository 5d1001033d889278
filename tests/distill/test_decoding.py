"""A checkpoint's own generation settings have no say in what any part of the project makes it write."""

import json

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from distill.completions import completions
from distill.decoding import GREEDY, Sampling, decode, ends_of
from distill.generation import generate, load
from distill.prompts import left_padded
from distill.recall import Example
from distill.recall.scoring import write
from tests.conftest import SHAPE

OWN = {
    "do_sample": True,
    "temperature": 3.0,
    "repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "min_new_tokens": 12,
}
NEW = 10


@pytest.fixture(scope="module")
def folders(stdlib_teacher, tmp_path_factory):
    """The same random model twice: plain, and with settings of its own in ``generation_config.json``."""
    tokenizer = AutoTokenizer.from_pretrained(stdlib_teacher)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE | {"vocab_size": len(tokenizer), "tie_word_embeddings": True}))
    plain, own = (tmp_path_factory.mktemp(name) for name in ("plain", "own"))
    for folder in (plain, own):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    settings = own / "generation_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | OWN))
    return plain, own


@torch.no_grad()
def by_hand(model, ids):
    """The likeliest token each time, without ``generate``."""
    ids = list(ids)
    for _ in range(NEW):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[-NEW:]


def test_everything_writes_plainly_greedily(folders):
    model, tokenizer = load(folders[1])
    assert model.generation_config.repetition_penalty == 5
    ids = tokenizer("def main(")["input_ids"]
    expected = by_hand(model, ids)
    assert len(set(expected)) < NEW  # a token comes again, which every one of the settings would prevent
    assert not set(expected) & set(ends_of(model))
    text = tokenizer.decode([*ids, *expected], skip_special_tokens=True)
    assert generate(model, tokenizer, ["def main("], max_new_tokens=NEW) == [text]
    assert "def main(" + completions(model, tokenizer, ["def main("], NEW)[0] == text
    assert write(model, [Example(tuple(ids), (tuple(expected),), 0, 1)], 1) == [tuple(expected)]
    assert model.generation_config.repetition_penalty == 5


def test_samples_are_those_of_the_plain_model(folders):
    (plain, tokenizer), (own, _) = (load(folder) for folder in folders)
    inputs = left_padded([tokenizer("import")["input_ids"]] * 3)
    drawn = [decode(model, inputs, NEW, sampling=Sampling(0.2, 0.95, seed=4)) for model in (plain, own)]
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0], decode(plain, inputs, NEW, sampling=Sampling(0.2, 0.95, seed=5)))
    assert not torch.equal(drawn[0], decode(plain, inputs, NEW, sampling=GREEDY))


def test_an_end_of_text_is_kept(folders):
    model, tokenizer = load(folders[1])
    ids = tokenizer("def main(")["input_ids"]
    expected = by_hand(model, ids)
    model.generation_config.eos_token_id = expected[4]
    assert decode(model, left_padded([ids]), NEW).tolist() == [expected[: expected.index(expected[4]) + 1]]
