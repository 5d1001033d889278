"""Text to batches: read documents, tokenise them once into memory-mapped blocks, serve blocks in seeded order."""

from distill.data.batches import Rows, TrainingBatches, evaluation_batches, micro_batches, steps_for
from distill.data.blocks import Blocks
from distill.data.corpus import Document, read_documents
from distill.data.pack import prepare
from distill.data.recipe_text import prepare_recipe_text
from distill.data.splits import split_documents

__all__ = [
    "Blocks",
    "Document",
    "Rows",
    "TrainingBatches",
    "evaluation_batches",
    "micro_batches",
    "prepare",
    "prepare_recipe_text",
    "read_documents",
    "split_documents",
    "steps_for",
]
