"""Blocks of real modules: no token is lost, and positions, labels and padding keep documents apart."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from distill.data import Blocks, Document, prepare, split_documents
from distill.errors import UserError

BLOCK = 128


@pytest.fixture
def prepared(library, tokenizer, tmp_path):
    train, held_out = split_documents(library, fraction=0.3)
    prepare(train, held_out, tokenizer, tmp_path / "data", block=BLOCK)
    return tmp_path / "data", {"train": train, "held_out": held_out}


@pytest.mark.parametrize("block", [7, BLOCK])
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_the_valid_tokens_of_all_blocks_are_the_tokenised_documents(prepared, tokenizer, split, block):
    folder, documents = prepared
    expected = []
    for document in documents[split]:
        expected += [tokenizer.bos_token_id, *tokenizer.encode(document.text, add_special_tokens=False)]
    blocks = Blocks(folder, split, block)
    rows = blocks.batch(range(len(blocks)))
    assert rows["input_ids"][rows["valid"]].tolist() == expected
    assert blocks.n_tokens == len(expected)
    assert blocks.n_full == len(expected) // block
    assert rows["valid"][: blocks.n_full].all()


def test_documents_come_back_as_text(prepared, tokenizer):
    folder, documents = prepared
    blocks = Blocks(folder, "held_out", BLOCK)
    texts = [tokenizer.decode(ids[1:]) for ids in blocks.documents()]
    assert texts == [document.text for document in documents["held_out"]]
    assert blocks.n_documents == len(texts)
    assert blocks.utf8_bytes == sum(len(text.encode()) for text in texts)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_positions_and_labels_follow_the_contract_token_by_token(prepared, split):
    folder, _ = prepared
    blocks = Blocks(folder, split, BLOCK)
    starts = set(np.cumsum([0] + [len(ids) for ids in blocks.documents()]).tolist())
    assert len(starts) - 1 == blocks.n_documents
    place = 0  # in the whole split: the rows are read as one long text
    for row in blocks:
        position = 0
        for t in range(BLOCK):
            is_valid = place < blocks.n_tokens
            begins = t == 0 or place in starts
            position = 0 if begins else position + 1
            assert row["valid"][t] == is_valid
            assert row["position_ids"][t] == position
            assert row["labels"][t] == (row["input_ids"][t] if is_valid and not begins else -100)
            place += 1


def test_rows_and_batches_have_the_contract_types(prepared):
    blocks = Blocks(prepared[0], "train", BLOCK)
    batch = blocks.batch([3, 0])
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in batch.items()} == {
        "input_ids": (torch.int64, (2, BLOCK)),
        "position_ids": (torch.int64, (2, BLOCK)),
        "labels": (torch.int64, (2, BLOCK)),
        "valid": (torch.bool, (2, BLOCK)),
    }
    for name, tensor in blocks[3].items():
        assert torch.equal(tensor, batch[name][0])


def test_only_the_last_block_is_padded(prepared):
    blocks = Blocks(prepared[0], "train", BLOCK)
    short = blocks.n_tokens % BLOCK
    assert short, "the text happens to fill its blocks; choose another block size"
    last = blocks[len(blocks) - 1]
    assert last["valid"].tolist() == [True] * short + [False] * (BLOCK - short)
    assert last["position_ids"][short:].tolist() == list(range(BLOCK - short))
    assert (last["labels"][short:] == -100).all()


def test_a_text_that_fills_its_blocks_has_no_padding(prepared):
    folder, _ = prepared
    n_tokens = Blocks(folder, "held_out", 2).n_tokens
    blocks = Blocks(folder, "held_out", n_tokens)
    assert len(blocks) == blocks.n_full == 1
    assert blocks[0]["valid"].all()


def test_blocks_outside_the_split_are_refused(prepared):
    blocks = Blocks(prepared[0], "train", BLOCK)
    for index in (-1, len(blocks)):
        with pytest.raises(IndexError):
            blocks[index]


def test_unusable_folders_are_said(prepared, tmp_path):
    folder, _ = prepared
    with pytest.raises(UserError, match="allowed: train, held_out"):
        Blocks(folder, "test", BLOCK)
    with pytest.raises(UserError, match="at least 2"):
        Blocks(folder, "train", 1)
    with pytest.raises(UserError, match=r"manifest\.json is missing"):
        Blocks(tmp_path, "train", BLOCK)


@pytest.mark.parametrize("name", ["train.tokens", "train.starts"])
def test_missing_and_truncated_files_are_named(prepared, name):
    folder, _ = prepared
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-2])
    with pytest.raises(UserError, match=rf"{name}: has {len(data) - 2} bytes instead of {len(data)}"):
        Blocks(folder, "train", BLOCK)
    (folder / name).unlink()
    with pytest.raises(UserError, match=rf"{name}: is missing"):
        Blocks(folder, "train", BLOCK)


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 1}', "\x00"])
def test_a_damaged_manifest_is_named(prepared, text):
    folder, _ = prepared
    (folder / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json: cannot be read"):
        Blocks(folder, "train", BLOCK)


@torch.no_grad()
def test_a_hugging_face_model_keeps_the_documents_of_a_block_apart(library, tokenizer, tmp_path):
    """The batch alone does it: position ids, no attention mask, no cache."""
    short = [Document(document.name, document.text[:60]) for document in library]
    prepare(short, short, tokenizer, tmp_path / "data", block=BLOCK)
    blocks = Blocks(tmp_path / "data", "train", BLOCK)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    batch = blocks.batch([0, len(blocks) - 1])
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    runs = 0
    for b in range(2):
        starts = (batch["position_ids"][b] == 0).nonzero().flatten().tolist()
        for first, last in zip(starts, [*starts[1:], BLOCK], strict=True):
            alone = model(input_ids=batch["input_ids"][b : b + 1, first:last], use_cache=False).logits
            torch.testing.assert_close(logits[b, first:last], alone[0])
            runs += 1
    assert runs > 4
