"""An aligned student with some layers given back to its teacher: for one measurement, or as a student of its own.

    student_S    layer_l = the teacher's, weights and all,   l ∈ S
                 layer_l = the student's, with its mixer,    l ∉ S

Layers that were aligned alone, each fed the teacher's hidden state, do not know which others keep attention. So one
student without any attention stands for every choice S: what a run with the layout S would have after the same stages
is in it already, but for what the clipping of gradients, which is common to all layers, would have changed.

It is the whole layer that comes back, its norms and MLP too: where stage 2 trained those beside a mixer, they are made
for that mixer.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.conversion import unset_model
from distill.decoder import layers_of, replace_layers
from distill.errors import UserError
from distill.layout import ATTENTION
from distill.student import is_student


@contextmanager
def restored(student: PreTrainedModel, teacher: PreTrainedModel, layers: Sequence[int]) -> Iterator[PreTrainedModel]:
    """Inside, ``student`` runs its teacher's layers at these places; afterwards it is what it was. No weight is copied.

    For forward passes over whole texts: a cache would have the student's layout and not this one.

    Args:
        student: an aligned student; in another dtype than its teacher it gets copies of the layers.
        layers: 0-based indices.

    Raises:
        UserError: a layer is not there, or the two have different depths.
    """
    _require_pair(student, teacher, layers)
    ours, theirs = layers_of(student), layers_of(teacher)

    def lent(index: int) -> nn.Module:
        layer = theirs[index]
        return layer if teacher.dtype == student.dtype else copy.deepcopy(layer).to(student.dtype)

    replace_layers(student, nn.ModuleList(lent(i) if i in layers else ours[i] for i in range(len(ours))))
    try:
        yield student
    finally:
        replace_layers(student, ours)


def hybrid(student: PreTrainedModel, teacher: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """A new student that keeps attention in ``layers`` besides where ``student`` does; in eval mode, in its dtype.

    Both models are left untouched, and nothing is shared with them.

    Raises:
        UserError: as ``restored``.
    """
    _require_pair(student, teacher, layers)
    config = copy.deepcopy(student.config)
    kinds = [ATTENTION if index in layers else kind for index, kind in enumerate(config.distill["layers"])]
    config.distill = {**config.distill, "layers": kinds}
    made: Any = unset_model(config, student.dtype)
    back = _prefixes(student, layers)
    weights = {name: value for name, value in student.state_dict().items() if not name.startswith(back)}
    weights |= {name: value for name, value in teacher.state_dict().items() if name.startswith(back)}
    made.load_state_dict(_as(student, weights))
    made.generation_config = copy.deepcopy(student.generation_config)
    return made.to(student.device).eval()


def _prefixes(student: PreTrainedModel, layers: Sequence[int]) -> tuple[str, ...]:
    """How the names of these layers' weights begin, which are the same in teacher and student."""
    chosen = {id(layers_of(student)[index]) for index in layers}
    return tuple(f"{name}." for name, module in student.named_modules() if id(module) in chosen)


def _as(student: PreTrainedModel, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(student.dtype) if value.is_floating_point() else value for name, value in weights.items()}


def _require_pair(student: PreTrainedModel, teacher: PreTrainedModel, layers: Sequence[int]) -> None:
    if not is_student(student) or is_student(teacher):
        raise UserError("layers are put back into a student, from the Transformer that it was converted from")
    depths = [len(layers_of(model)) for model in (student, teacher)]
    if depths[0] != depths[1]:
        raise UserError(f"the student has {depths[0]} layers and the teacher {depths[1]}: it came from another teacher")
    outside = [index for index in layers if not 0 <= index < depths[0]]
    if outside:
        named = ", ".join(map(str, outside))
        raise UserError(f"layer {named} cannot be put back: the teacher has {depths[0]}, numbered 0 to {depths[0] - 1}")
