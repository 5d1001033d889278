"""Text to batches: read documents, tokenise them once into memory-mapped blocks, serve blocks in seeded order."""

from distill.data.batches import TrainingBatches, evaluation_batches, steps_for
from distill.data.blocks import Blocks
from distill.data.corpus import Document, read_documents, split_documents
from distill.data.pack import prepare

__all__ = [
    "Blocks",
    "Document",
    "TrainingBatches",
    "evaluation_batches",
    "prepare",
    "read_documents",
    "split_documents",
    "steps_for",
]
