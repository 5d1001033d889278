"""Real text and a small real tokenizer for the data tests."""

from pathlib import Path

import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from distill.data import Document, read_documents

# Text that is not ours lies in a folder beside the checkout, and is read where it lies.
SHARED_TEXT = Path(__file__).resolve().parents[3] / "../shared/text"


@pytest.fixture(scope="session")
def shared_text() -> Path:
    if not SHARED_TEXT.is_dir():
        pytest.skip(f"no texts beside the checkout ({SHARED_TEXT})")
    return SHARED_TEXT


@pytest.fixture(scope="session")
def stdlib() -> list[Document]:
    return list(read_documents("python-stdlib"))


@pytest.fixture(scope="session")
def library(stdlib: list[Document]) -> list[Document]:
    """A dozen modules of the standard library: some hundred blocks, and quick to go through by hand."""
    return [document for document in stdlib if document.name.startswith(("json/", "tomllib/", "wsgiref/"))]


@pytest.fixture(scope="session")
def bpe(library: list[Document]) -> tokenizers.Tokenizer:
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([document.text for document in library[:4]], trainer)
    bpe.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", bpe.token_to_id("<bos>"))]
    )
    return bpe


@pytest.fixture
def tokenizer(bpe: tokenizers.Tokenizer) -> PreTrainedTokenizerFast:
    """Adds ``<bos>`` of its own accord when asked for special tokens, as Llama's does."""
    copy = tokenizers.Tokenizer.from_str(bpe.to_str())
    return PreTrainedTokenizerFast(tokenizer_object=copy, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>")


@pytest.fixture
def plain_tokenizer(bpe: tokenizers.Tokenizer) -> PreTrainedTokenizerFast:
    """Names no special token."""
    return PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer.from_str(bpe.to_str()))
