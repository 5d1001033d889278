"""What a model calls the tensors of a checkpoint: transformers renames some when it loads them.

Vision-language checkpoints are stored under the names of older releases (``language_model.model.layers…``), others as
parts that loading puts together (one file entry an expert, one parameter for all of them).
"""

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

Renamed = tuple[str, bool]
"""A tensor's name in the model, and whether it is only part of what has that name there."""


def names_in(model: PreTrainedModel) -> Callable[[str], Renamed]:
    """What turns names of a checkpoint into those of ``model``, which may be without weights."""
    transforms: list[Any] = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters: list[Any] = [transform for transform in transforms if not isinstance(transform, WeightRenaming)]

    def renamed(name: str) -> Renamed:
        own, converter = rename_source_key(name, renamings, converters)
        return own, converter is not None

    return renamed
