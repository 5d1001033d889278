"""Tokenizers in llama.cpp's terms, and those that it has no terms for."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from distill import UserError
from distill.export.vocabulary import (
    _LLAMA3,
    _QWEN2,
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    vocabulary,
)


def test_sentencepiece_by_merges(stories_teacher: Path) -> None:
    words = vocabulary(AutoTokenizer.from_pretrained(stories_teacher), 515)
    assert (words.model, words.cut, words.add_bos, words.add_eos, words.add_space) == (
        "llama",
        "default",
        True,
        False,
        True,
    )
    assert words.tokens[:5] == ["<unk>", "<s>", "</s>", "<0x00>", "<0x01>"]
    assert words.tokens[512:] == ["[PAD512]", "[PAD513]", "[PAD514]"]
    assert words.kinds[:4] == [UNKNOWN, CONTROL, CONTROL, BYTE]
    assert words.kinds[300] == NORMAL
    assert words.kinds[512:] == [UNUSED] * 3
    assert words.special == {"bos": 1, "eos": 2, "unk": 0}
    assert words.merges == []


def test_pieces_of_the_highest_score_first_is_what_merges_do(stories_teacher: Path, stories_text: Path) -> None:
    """llama.cpp joins, again and again, the neighbours whose joined piece has the highest score, leftmost first."""
    tokenizer = AutoTokenizer.from_pretrained(stories_teacher)
    words = vocabulary(tokenizer, 512)
    score = {
        token: score
        for token, score, kind in zip(words.tokens, words.scores, words.kinds, strict=True)
        if kind == NORMAL
    }

    def tokenise(text: str) -> list[str]:
        pieces = list("▁" + text.replace(" ", "▁"))
        while True:
            joined = [pieces[at] + pieces[at + 1] for at in range(len(pieces) - 1)]
            known = [at for at, piece in enumerate(joined) if piece in score]
            if not known:
                return pieces
            best = max(known, key=lambda at: (score[joined[at]], -at))
            pieces[best : best + 2] = [joined[best]]

    text = stories_text.read_text(encoding="utf-8")[:6000]
    for line in filter(None, text.split("\n")):
        if all(letter in score for letter in "▁" + line.replace(" ", "▁")):
            assert tokenise(line) == tokenizer.convert_ids_to_tokens(tokenizer(line)["input_ids"][1:])


def test_byte_level_bpe(stdlib_teacher: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(stdlib_teacher)
    words = vocabulary(tokenizer, 1024)
    assert (words.model, words.cut, words.add_bos, words.scores) == ("gpt2", "gpt-2", True, [])
    assert words.kinds[:4] == [CONTROL, CONTROL, CONTROL, NORMAL]
    assert words.special == {"bos": 0, "eos": 1, "pad": 2}
    assert all(len(merge.split(" ")) == 2 for merge in words.merges)
    assert {merge.replace(" ", "") for merge in words.merges} <= set(words.tokens)


def bpe(pre_tokenizer: pre_tokenizers.PreTokenizer, **model: object) -> PreTrainedTokenizerFast:
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab={**letters, "ab": 256}, merges=[("a", "b")], **model))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    fast.add_tokens(["<mine>"])
    return fast


SPLIT = pre_tokenizers.Split
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def sequence(*steps: pre_tokenizers.PreTokenizer) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(list(steps))


def regex(pattern: str) -> pre_tokenizers.PreTokenizer:
    from tokenizers import Regex

    return SPLIT(Regex(pattern), behavior="isolated", invert=False)


@pytest.mark.parametrize(
    ("pre_tokenizer", "cut"),
    [
        (GPT2, "gpt-2"),
        (sequence(regex(_LLAMA3), BYTES), "llama-bpe"),
        (sequence(regex(_QWEN2), BYTES), "qwen2"),
        (sequence(pre_tokenizers.Digits(individual_digits=True), GPT2), "smollm"),
    ],
)
def test_how_text_is_cut(pre_tokenizer: pre_tokenizers.PreTokenizer, cut: str) -> None:
    words = vocabulary(bpe(pre_tokenizer), 259)
    assert words.cut == cut
    assert words.kinds[-2:] == [CONTROL, USER_DEFINED]
    assert not words.add_bos


@pytest.mark.parametrize(
    "pre_tokenizer",
    [
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        sequence(regex(r"\w+"), BYTES),
        sequence(regex(_LLAMA3), GPT2),
        sequence(pre_tokenizers.Digits(individual_digits=False), GPT2),
        sequence(pre_tokenizers.Digits(individual_digits=True), regex(_LLAMA3), BYTES),
        pre_tokenizers.Whitespace(),
    ],
)
def test_other_cuts_are_refused(pre_tokenizer: pre_tokenizers.PreTokenizer) -> None:
    with pytest.raises(UserError, match="a BPE tokenizer that cuts text by"):
        vocabulary(bpe(pre_tokenizer), 259)


def test_other_models_are_refused() -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    with pytest.raises(UserError, match="a WordLevel tokenizer has no counterpart"):
        vocabulary(PreTrainedTokenizerFast(tokenizer_object=words), 2)

    pieces = {"<unk>": 0, "▁": 1, "a": 2, "b": 3, "▁ab": 4, **{f"<0x{byte:02X}>": 5 + byte for byte in range(256)}}
    tokenizer = Tokenizer(models.BPE(vocab=pieces, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    with pytest.raises(UserError, match=r"pieces that no merge makes \('▁ab'\)"):
        vocabulary(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>"), 261)


def test_more_tokens_than_rows_are_refused() -> None:
    with pytest.raises(UserError, match="has a token 258 and the embedding 258 rows"):
        vocabulary(bpe(GPT2), 258)


def test_bos_is_added_where_the_tokenizer_adds_it() -> None:
    tokenizer = bpe(GPT2)
    backend = tokenizer.backend_tokenizer
    backend.add_special_tokens(["<s>"])
    added = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", added), ("</s>", 257)]
    )
    words = vocabulary(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>"), 260)
    assert words.add_bos
    assert words.add_eos
