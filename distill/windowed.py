"""A teacher that sees no more than a hybrid remembers: the first tokens and the latest ones, in chosen layers.

`distill.window` has the mask. Nothing is trained, so this is what any student with mixers in the same layers has to
beat.
"""

import copy
from collections.abc import Sequence

from transformers import PreTrainedModel

from distill.attention import views
from distill.conversion import report
from distill.decoder import attention_of, layers_of
from distill.errors import UserError
from distill.layout import mixer_layers
from distill.student import is_student, state_bytes
from distill.vision import read_both_ways
from distill.window import SINKS, Window, put_window

IMPLEMENTATIONS = ("eager", "sdpa")
_NOT_AS_IT_WAS = "a window is put into a teacher as it was, not into a student or into a model that has one"


def windowed(teacher: PreTrainedModel, layers: Sequence[int], *, window: int, sinks: int = SINKS) -> PreTrainedModel:
    """The same model, with weights shared, whose ``layers`` see the first ``sinks`` tokens and the last ``window``.

    Args:
        teacher: a stock model with attention computed by ``eager`` or ``sdpa``; left untouched.
        layers: 0-based indices.
        window: tokens, the query's own counted; one as long as the text leaves every number as it was.
        sinks: tokens at the beginning of each document; 0 is a plain sliding window.

    Returns:
        A model of the teacher's class, in its mode and dtype; ``window_of`` tells it from its teacher.

    Raises:
        UserError: for a student, layers that are not there, sizes below their least, or another implementation.
    """
    rule = Window(tuple(sorted(set(layers))), window, sinks)
    _require_sound(teacher, rule)
    own = {index: view.sliding_window for index, view in views(teacher, rule.layers).items()}
    # A deep copy that takes every tensor for a copy of itself: other modules and hooks, the same weights.
    shared = {id(tensor): tensor for tensor in (*teacher.parameters(), *teacher.buffers())}
    model = copy.deepcopy(teacher, shared)
    for index in rule.layers:
        put_window(attention_of(layers_of(model)[index]), index, rule, own[index])
    model._is_stateful = True  # what has left the window cannot be rolled back to
    model.distill_window = rule  # type: ignore[assignment]
    return model


def matching_window(teacher: PreTrainedModel, student: PreTrainedModel, *, sinks: int = SINKS) -> Window:
    """The window, in the layers where ``student`` has mixers, that remembers as many bytes as those mixers do.

    Args:
        teacher, student: may be without weights, but must have their dtypes, by which keys and values count as well as
            a mixer's last inputs; its state is fp32.

    Raises:
        UserError: the student has no mixers, or another depth.
    """
    if is_student(teacher):
        raise UserError(_NOT_AS_IT_WAS)
    if not is_student(student) or not mixer_layers(student.config):
        raise UserError("a window like a student's is put where it has mixers, and this model has none")
    depths = [len(layers_of(model)) for model in (teacher, student)]
    if depths[0] != depths[1]:
        raise UserError(f"the teacher has {depths[0]} layers and the student {depths[1]}: it came from another teacher")
    layers, found = mixer_layers(student.config), report(teacher, student)
    per_token = found.teacher_kv_bytes_per_token // depths[0] * len(layers)
    return Window(tuple(layers), max(1, state_bytes(student) // per_token - sinks), sinks)


def window_of(model: PreTrainedModel) -> Window | None:
    """What :func:`windowed` was asked for; None for a model that it did not make."""
    return getattr(model, "distill_window", None)


def _require_sound(teacher: PreTrainedModel, rule: Window) -> None:
    depth = len(layers_of(teacher))
    outside = [index for index in rule.layers if not 0 <= index < depth]
    if outside or not rule.layers:
        named = ", ".join(map(str, outside)) or "no layer"
        raise UserError(f"a window in {named}: the teacher has {depth} layers, numbered 0 to {depth - 1}; name some")
    if rule.window < 1 or rule.sinks < 0:
        raise UserError(f"window is {rule.window} and sinks {rule.sinks}; they are at least 1 and 0 tokens")
    if is_student(teacher) or window_of(teacher) is not None:
        raise UserError(_NOT_AS_IT_WAS)
    if read_both_ways(teacher.config) is not None:
        raise UserError("this teacher reads images in both directions, which a window of the latest tokens does not")
    used = teacher.config.get_text_config()._attn_implementation
    if used not in IMPLEMENTATIONS:
        allowed = " or ".join(IMPLEMENTATIONS)
        raise UserError(
            f"attention is computed by {used}, which takes no mask of ours; load the teacher with {allowed}"
        )
