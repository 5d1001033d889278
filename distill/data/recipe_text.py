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
    return prepare_source(
        recipe_text(data),
        tokenizer,
        folder,
        block=data.block,
        bos=data.bos,
        eos=data.eos,
        limit=data.limit,
        workers=data.workers,
    )


def recipe_text(data: Data) -> "RecipeText":
    """The text of a recipe; none of it is read yet.

    Raises:
        UserError: A source does not exist, or a Parquet file among them is cut short.
    """

    options: dict[str, Any] = {
        "text_key": data.text_key,
        "separator": data.separator,
        "streaming": data.streaming,
    }
    more = find_shards(data.training_only, key="data.training_only", **options) if data.training_only else []
    return RecipeText(data, find_shards(data.source, **options), more)


@dataclass(frozen=True)
class RecipeText:
    """The documents of ``data.source``, each on the side where ``data.held_out`` puts it; then those trained on only.

    So what is held out does not depend on the latter. In positions their shards count on from those of the source.
    """

    data: Data
    shards: list[Shard]
    training_only: list[Shard]

    @property
    def _options(self) -> list[Any]:
        held_out = self.data.held_out
        # Where the second list begins decides the split, but only where there is one.
        border = [len(self.shards), self.data.train_on_source] if self.training_only else []
        return [self.data.text_key, self.data.separator, held_out.by, held_out.fraction, *border]

    def request(self) -> Any:
        return [self._options, [shard.identity() for shard in (*self.shards, *self.training_only)]]

    def made_from(self) -> tuple[Any, list[Any]]:
        total = self._rule.total if isinstance(self._rule, ByTail) else None
        return [self._options, total], [shard.version() for shard in (*self.shards, *self.training_only)]

    def split(self) -> str:
        return f"by {self.data.held_out.by} at {self.data.held_out.fraction}"

    def read(self, position: Any, before: Extent) -> Iterator[Item]:
        if position is not None and position[0] >= len(self.shards):
            return
        if not self.data.train_on_source:
            yield from self._held_out_alone(position)
            return
        for after, document in read_shards(self.shards, position):
            yield Item(document, HELD_OUT if self._rule.holds_out(document, before) else TRAIN, after)
            before = before.and_one(document)

    def _held_out_alone(self, position: Any) -> Iterator[Item]:
        """What ``read`` holds out, and nothing else; read from the beginning, since all of it decides the split."""
        before, is_new = Extent(), position is None
        for after, document in read_shards(self.shards):
            if self._rule.holds_out(document, before) and is_new:
                yield Item(document, HELD_OUT, after)
            before = before.and_one(document)
            is_new = is_new or list(after) == list(position)

    def read_training_only(self, position: Any) -> Iterator[Item]:
        first = len(self.shards)
        begun = (position[0] - first, position[1]) if position is not None and position[0] >= first else None
        for (shard, place), document in read_shards(self.training_only, begun):
            yield Item(document, TRAIN, (first + shard, place))

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
