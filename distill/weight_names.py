"""What a model calls the tensors of a checkpoint: transformers renames some when it loads them.

Vision-language checkpoints are stored under the names of older releases (``language_model.model.layers…``), others as
parts that loading puts together: one file entry an expert and projection, one parameter for all of them,

    parameter[e] = concatenation over k of entry (e, k)         e expert, k which of its projections
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightRenaming, rename_source_key


class Part(NamedTuple):
    """Which part of a parameter a tensor is.

    Attributes:
        expert, piece: e and k.
        pieces: how many each expert has.
    """

    expert: int
    piece: int
    pieces: int


class Renamed(NamedTuple):
    """A tensor of a checkpoint, as the model knows it.

    Attributes:
        name: of the parameter.
        whole: whether the tensor is all of it.
        part: which part it is; None where it is whole, or put together in another way than experts are.
    """

    name: str
    whole: bool = True
    part: Part | None = None


def names_in(model: PreTrainedModel) -> Callable[[str], Renamed]:
    """What turns names of a checkpoint into those of ``model``, which may be without weights."""
    transforms: list[Any] = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters: list[Any] = [transform for transform in transforms if not isinstance(transform, WeightRenaming)]

    def renamed(name: str) -> Renamed:
        own, pattern = rename_source_key(name, renamings, converters)
        if pattern is None:
            return Renamed(own)
        converter = next(converter for converter in converters if pattern in converter.source_patterns)
        return Renamed(own, whole=False, part=_part(name, pattern, converter))

    return renamed


def _part(name: str, pattern: str, converter: Any) -> Part | None:
    """Of a tensor that is one expert's: experts stacked, the pieces of each laid one below the other."""
    steps = [(type(step), step.dim) for step in converter.operations if isinstance(step, MergeModulelist | Concatenate)]
    expert = re.search(re.escape(pattern).replace(r"\*", r"(\d+)"), name)
    stacked = [(MergeModulelist, 0), (Concatenate, 1)]
    if expert is None or len(steps) < len(converter.operations) or steps != stacked[: len(steps)]:
        return None
    pieces = converter.source_patterns
    return Part(int(expert[1]), pieces.index(pattern), len(pieces))
