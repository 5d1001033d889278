"""The text of a recipe as a source: shards that are read one after another, and split document by document."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from distill.data.blocks import Manifest
from distill.data.corpus import find_shards, read_shards
from distill.data.pack import prepare_source
from distill.data.progress import progress
from distill.data.shards import Shard
from distill.data.source import Item
from distill.data.splits import HELD_OUT, TRAIN, ByHash, ByTail, Extent, SplitRule
from distill.recipe import Data


def prepare_recipe_text(data: Data, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Manifest:
    """Tokenise what a recipe trains and is measured on into ``folder``; see ``prepare_source``.

    Files are known by their names, sizes and times, datasets of the Hub by their names: as long as these are the same,
    a folder that is there is used again without reading the text.

    Raises:
        UserError: see ``prepare_source``.
    """
    shards = find_shards(data.source, text_key=data.text_key, separator=data.separator, streaming=data.streaming)
    return prepare_source(
        RecipeText(data, shards),
        tokenizer,
        folder,
        block=data.block,
        bos=data.bos,
        eos=data.eos,
        limit=data.limit,
        workers=data.workers,
    )


@dataclass(frozen=True)
class RecipeText:
    """The documents of ``data.source``, each on the side where ``data.held_out`` puts it."""

    data: Data
    shards: list[Shard]

    @property
    def _options(self) -> list[Any]:
        held_out = self.data.held_out
        return [self.data.text_key, self.data.separator, held_out.by, held_out.fraction]

    def request(self) -> Any:
        return [self._options, [shard.identity() for shard in self.shards]]

    def made_from(self) -> tuple[Any, list[Any]]:
        total = self._rule.total if isinstance(self._rule, ByTail) else None
        return [self._options, total], [shard.version() for shard in self.shards]

    def split(self) -> str:
        return f"by {self.data.held_out.by} at {self.data.held_out.fraction}"

    def read(self, position: Any, before: Extent) -> Iterator[Item]:
        for after, document in read_shards(self.shards, position):
            yield Item(document, HELD_OUT if self._rule.holds_out(document, before) else TRAIN, after)
            before = before.and_one(document)

    @cached_property
    def _rule(self) -> SplitRule:
        """How documents are split; by tail takes a first pass over the text, to learn how long it is."""
        held_out = self.data.held_out
        if held_out.by == "hash":
            return ByHash(held_out.fraction)
        return ByTail(held_out.fraction, self._extent())

    def _extent(self) -> Extent:
        extent = Extent()
        with progress("reading the text once to find its tail", "documents") as show:
            for _, document in read_shards(self.shards):
                extent = extent.and_one(document)
                show(extent.documents)
        return extent
