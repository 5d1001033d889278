"""Greedy continuations against a loop without cache or padding."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from distill import convert
from distill.completions import completions
from distill.engines import processes
from distill.engines.launched import Launched
from distill.engines.placement import place_student
from distill.errors import UserError
from tests.distill.engines.several import several


def tiny_llama(vocabulary: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.4,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(3)
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def letters() -> PreTrainedTokenizerFast:
    """One token a character: a-z, space, and markers; a BOS before every text."""
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz "])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@torch.no_grad()
def greedy(model: LlamaForCausalLM, ids: list[int], new_tokens: int) -> list[int]:
    for _ in range(new_tokens):
        ids = [*ids, int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())]
    return ids[-new_tokens:]


def text(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("pad", [None, "</s>"])
def test_completions_are_greedy_for_prompts_of_any_length(letters, pad):
    model = tiny_llama(len(letters)).train()
    model.generation_config.update(do_sample=True, temperature=5.0, top_p=0.4, repetition_penalty=2.0)
    letters.pad_token = pad
    prompts = ["a cat", "b", "how long is a prompt"]
    model.eval()
    expected = [text(letters, greedy(model, letters(prompt)["input_ids"], 9)) for prompt in prompts]
    assert completions(model.train(), letters, prompts, 9) == expected
    assert len(set(expected)) > 1
    assert model.training
    assert completions(model, letters, [], 9) == []


def test_text_that_changes_where_prompt_and_continuation_meet_is_not_cut(letters):
    model = tiny_llama(len(letters))
    expected = text(letters, greedy(model, letters("a cat")["input_ids"], 9))
    meeting = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(letters.backend_tokenizer.to_str()))
    joined = decoders.Replace(f"t{expected[0]}", "X")
    meeting.backend_tokenizer.decoder = decoders.Sequence([decoders.Fuse(), joined])
    assert "X" in meeting.decode(letters(f"a cat{expected}")["input_ids"])
    assert text(letters, meeting(completions(model, meeting, ["a cat"], 9)[0])["input_ids"]) == expected


def test_completions_end_before_the_end_of_text(letters):
    model = tiny_llama(len(letters))
    ids = greedy(model, letters("a cat")["input_ids"], 9)
    assert ids[6] not in ids[:6]
    model.generation_config.eos_token_id = [1000, ids[6]]
    letters.pad_token = "z"
    assert completions(model, letters, ["a cat"], 9) == [text(letters, ids[:6])]


def test_a_bos_is_put_once(letters):
    model = tiny_llama(len(letters))
    assert completions(model, letters, ["a cat"], 5, bos=True) == completions(model, letters, ["a cat"], 5)
    assert completions(model, letters, [""], 5, bos=True) == completions(model, letters, [""], 5)


def test_a_prompt_without_tokens_is_refused():
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(UserError, match="the prompt '' has no token"):
        completions(tiny_llama(1), bare, [""], 5)


def ended_by(model: PreTrainedModel, end: int | None) -> PreTrainedModel:
    model.generation_config.update(eos_token_id=end, pad_token_id=0)
    return model


def continued_in_shards(folder: Path, tokenizer: PreTrainedTokenizerFast, end: int) -> list[str]:
    """One of two processes comes to an end of text and the other, which computes the same, does not."""
    model = place_student(folder, Launched("fsdp2", {"reshard_after_forward": True}), torch.device("cpu"), frozen=True)
    return completions(ended_by(model, end if processes.rank() == 1 else None), tokenizer, ["a cat"], 9, sharded=True)


def test_in_shards_none_stops_before_the_last(letters, tmp_path):
    student = convert(tiny_llama(len(letters)), keep_attention=[1])
    student.save_pretrained(tmp_path / "student")
    letters.pad_token = "</s>"
    expected = completions(ended_by(student, None), letters, ["a cat"], 9)
    end = letters(expected[0][1])["input_ids"][-1]
    cut = completions(ended_by(student, end), letters, ["a cat"], 9)
    assert len(cut[0]) < len(expected[0])
    assert several(2, continued_in_shards, tmp_path / "student", letters, end) == [expected, cut]
