"""Teacher in, student out: plan, check, swap, seed, report.

Nothing is changed before everything is checked, and the teacher is never changed: the student is a new model of the
teacher's own class (``distill.student``) with copies of its weights.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Unpack

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from distill.attention import AttentionView, views
from distill.calibration import calibrate
from distill.choices import Choices, Chosen
from distill.decoder import attention_of, layers_of
from distill.errors import UserError
from distill.evaluating import evaluating
from distill.families import FAMILIES, family_name
from distill.fitting import Calibrated
from distill.heads import described, fill_heads_, require_heads
from distill.layout import ATTENTION, WINDOWED, kept_heads, layer_kinds, mixer_layers, resolve, told_apart
from distill.memories import set_apart_
from distill.mixer_settings import own_settings, shared_settings, state_dim_of
from distill.mixers import SlidingWindowMixer, bare, is_mixer
from distill.mixers.kept_heads import kept_numel_per_token
from distill.roles import ROLES, roles
from distill.rotation import require_rotation
from distill.seeding import Seeded, seed_mixer
from distill.student import (
    load_model,
    mixers_of,
    state_bytes,
    student_class,
    student_config,
    teacher_class,
)
from distill.verification import verify, verify_delivery
from distill.vision import refuse_both_ways

CONTEXTS = (1024, 4096, 32768, 131072)


@dataclass(frozen=True)
class Report:
    """What a conversion did; plain data, kept as ``conversion.json``.

    Attributes:
        layers: one name a layer, ``"attention"`` or the mixer's.
        seeded: for each changed layer, where each part of the mixer came from; empty if mixers started at random.
        parameters_before, parameters_after: counts by role (``distill.roles``).
        state_bytes: what all mixers remember per sequence, at any length: states in fp32, the inputs of convolutions
            and what windows hold in the teacher's dtype, which a student has when it is converted.
        kv_bytes_per_token: what kept attention, of layers and of single heads, adds per token, in the teacher's dtype.
        teacher_kv_bytes_per_token: what the teacher adds per token.
        view_error: how far the teacher's attention, recomputed as it was read, is from its own output at most,
            relative to the largest (``distill.verification``); None where nothing was converted.
        rope: whether the mixers keep the teacher's rotary positions.
        heads: query heads that keep attention beside the mixer of their layer.
        calibrated: for each changed layer, what was fitted on text afterwards (``distill.fitting``); None if nothing.
    """

    layers: list[str]
    seeded: dict[int, list[Seeded]]
    parameters_before: dict[str, int]
    parameters_after: dict[str, int]
    state_bytes: int
    kv_bytes_per_token: int
    teacher_kv_bytes_per_token: int
    rope: str
    view_error: float | None = None
    heads: dict[int, list[int]] = field(default_factory=dict)
    calibrated: dict[int, Calibrated] | None = None

    def cache_bytes(self, tokens: int) -> tuple[int, int]:
        """(student's, teacher's) cache bytes for a sequence of ``tokens``."""
        return self.state_bytes + tokens * self.kv_bytes_per_token, tokens * self.teacher_kv_bytes_per_token

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def convert(teacher: str | Path | PreTrainedModel, **choices: Unpack[Chosen]) -> PreTrainedModel:
    """Turn a pretrained Transformer into a student with linear-time layers.

    Args:
        teacher: a Hugging Face folder (or hub id), or a loaded model, which is left untouched.
        **choices: by keyword what ``distill.choices.Choices`` has, where each is explained: ``mixer``,
            ``keep_attention``, ``keep_heads``, ``seed``, ``seed_from_attention``, ``from_scratch``, ``expand``,
            ``state_dim``, ``conv_width``, ``rope``, ``bidirectional``, ``window_layers``, ``window``, ``sinks``.

    Returns:
        A ``PreTrainedModel`` in eval mode: in fp32 if ``teacher`` is a folder, in a loaded teacher's dtype and on its
        device otherwise.

    Raises:
        UserError: for an unknown mixer or family, a layer out of range, a teacher that cannot be read, or
            ``rope="keep"`` where attention's positions are not rotary ones that a mixer could have.
    """
    model = load_teacher(teacher) if isinstance(teacher, str | Path) else teacher
    student, _ = convert_with_report(model, **choices)
    return student


def convert_with_report(teacher: PreTrainedModel, **choices: Unpack[Chosen]) -> tuple[PreTrainedModel, Report]:
    """:func:`convert`, with the account of what was done."""
    wanted = Choices(**choices)
    with evaluating(teacher):  # one in training mode would be looked at through its dropout
        return _converted(teacher, wanted, _planned(teacher.config, wanted))


def _converted(teacher: PreTrainedModel, wanted: Choices, config: PreTrainedConfig) -> tuple[PreTrainedModel, Report]:
    replaced = views(teacher, mixer_layers(config))
    errors = verify(teacher, replaced)

    with torch.random.fork_rng(devices=[]):
        # Of the CPU alone, where weights are drawn: torch.manual_seed changes every device's, and the fork keeps one.
        torch.default_generator.manual_seed(wanted.seed)
        student = _build(config, teacher)
    if wanted.expand > 1:
        for made in mixers_of(student).values():
            if is_mixer(made):
                set_apart_(made, wanted.expand)
    if not wanted.from_scratch:
        _copy_weights(teacher, student)
    if replaced and family_name(teacher.config) not in FAMILIES:
        verify_delivery(student)
    seeds = wanted.seed_from_attention and not wanted.from_scratch
    seeded = _seed(student, teacher, replaced, wanted.seed) if seeds else {}
    if not wanted.from_scratch:
        for index in kept_heads(config):
            fill_heads_(attention_of(layers_of(student)[index]), replaced[index])
    return student, report(teacher, student, seeded, max(errors.values(), default=None))


def plan(teacher: PreTrainedConfig, **choices: Unpack[Chosen]) -> PreTrainedConfig:
    """The student's config, everything checked, without a weight in memory.

    Args:
        teacher: its config.
        **choices: as :func:`convert`.

    Raises:
        UserError: as :func:`convert`.
    """
    return _planned(teacher, Choices(**choices))


def _planned(teacher: PreTrainedConfig, wanted: Choices) -> PreTrainedConfig:
    if getattr(teacher, "distill", None) is not None:
        raise UserError("the teacher is already a student of this project; convert the Transformer it came from")
    depth = teacher.get_text_config().num_hidden_layers
    kept = resolve(depth, layers=list(wanted.keep_attention))
    if wanted.bidirectional != "causal" and len(kept) < depth:
        refuse_both_ways(teacher)
    layers = layer_kinds(depth, kept, wanted.mixer, wanted.window_layers)
    changed = [index for index, kind in enumerate(layers) if kind != ATTENTION]
    empty = empty_model(teacher)
    seen = views(empty, changed or [0])
    attention = _of_one_shape(seen, teacher)
    state_dim = wanted.state_dim or state_dim_of(wanted.mixer, attention.head_dim)
    if wanted.rope == "keep" and wanted.mixer != WINDOWED:  # behind a window positions are what they always were
        require_rotation(empty, [index for index in changed if layers[index] != WINDOWED], state_dim)
    shared = shared_settings(
        teacher,
        attention,
        expand=wanted.expand,
        state_dim=state_dim,
        conv_width=wanted.conv_width,
        rope=wanted.rope,
    )
    own = own_settings(wanted.mixer, layers, seen, wanted.window, wanted.sinks)
    heads = dict(wanted.keep_heads or {})
    require_heads(heads, layers, attention.n_heads, wanted.mixer)
    return student_config(teacher, layers, shared | own, described(empty, seen, heads))


def _of_one_shape(attention: dict[int, AttentionView], teacher: PreTrainedConfig) -> AttentionView:
    """The first, whose heads all others must have."""
    shapes = {index: f"{view.n_heads} heads of {view.head_dim} channels" for index, view in attention.items()}
    if len(set(shapes.values())) > 1:
        told, odd = told_apart(shapes)
        raise UserError(
            f"layers of this {family_name(teacher)} have different heads, and mixers are all of one shape ({told}); put"
            f" {odd} in keep_attention"
        )
    return next(iter(attention.values()))


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A teacher or student without weights (on the meta device): for counting parameters and bytes."""
    with torch.device("meta"):
        return _without_weights(config)


def unset_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A teacher or student in CPU memory whose weights are still to be filled in; its buffers are right.

    Memory that nothing was written to is not taken from the machine, so the model costs nothing yet.
    """
    with _default_dtype(dtype):
        return _without_weights(config)


def _without_weights(config: PreTrainedConfig) -> PreTrainedModel:
    stock = teacher_class(config)
    model_class = stock if getattr(config, "distill", None) is None else student_class(stock)
    with no_init_weights():
        model = model_class(copy.deepcopy(config))
    model.tie_weights()  # skipped above, together with the initialisation
    return model


def load_teacher(folder: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a teacher with its stock class, frozen, in eval mode.

    Raises:
        UserError: if the folder is missing or cannot be read as a model.
    """
    try:
        model = load_model(folder, dtype=dtype)
    except UserError:
        raise
    except Exception as error:  # transformers raises OSError, ValueError, SafetensorError, KeyError, … here
        raise UserError(f"cannot load the teacher {str(folder)!r}: {error}") from error
    return model.eval().requires_grad_(False)


def report(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    seeded: dict[int, list[Seeded]] | None = None,
    view_error: float | None = None,
) -> Report:
    """Count what changed; works on models without weights too."""
    first = next(iter(mixer_layers(student.config)), 0)
    attention = views(teacher, [first])[first]
    kv_bytes = 2 * attention.n_kv_heads * attention.head_dim * teacher.dtype.itemsize
    kinds, of_heads = student.config.distill["layers"], kept_numel_per_token(student.config.distill)
    return Report(
        layers=kinds,
        seeded=seeded or {},
        parameters_before=_count_by_role(teacher),
        parameters_after=_count_by_role(student),
        state_bytes=state_bytes(student, teacher.dtype),
        kv_bytes_per_token=(len(kinds) - len(mixer_layers(student.config))) * kv_bytes
        + of_heads * teacher.dtype.itemsize,
        teacher_kv_bytes_per_token=len(kinds) * kv_bytes,
        rope=student.config.distill["mixer"].get("rope", "drop"),
        view_error=view_error,
        heads=kept_heads(student.config),
    )


def _build(config: PreTrainedConfig, teacher: PreTrainedModel) -> PreTrainedModel:
    """A student with untrained mixers and, everywhere else, weights still to be copied."""
    with _default_dtype(teacher.dtype):
        made = student_class(teacher_class(teacher.config))
        student = made._from_config(config, attn_implementation=_attention_implementation(teacher.config))
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.to(teacher.device).eval()


def _attention_implementation(config: PreTrainedConfig) -> dict[str, str | None]:
    """Which code computes attention, as the teacher has it: in each of its parts, since not every part knows each."""
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    used = {name: part._attn_implementation for name, part in parts.items() if part is not None}
    return {"": config._attn_implementation, **used}


def _copy_weights(teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    mixers = {id(mixer) for mixer in mixers_of(student).values()}
    changed = tuple(f"{name}." for name, module in student.named_modules() if id(module) in mixers)
    missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
    strays = [name for name in (*missing, *unexpected) if not name.startswith(changed)]
    assert not strays, f"teacher and student differ outside the changed layers: {strays}"


def _seed(
    student: PreTrainedModel, teacher: PreTrainedModel, replaced: dict[int, AttentionView], seed: int
) -> dict[int, list[Seeded]]:
    slots = mixers_of(student)
    seeded, theirs = dict[int, list[Seeded]](), layers_of(teacher)
    for index, slot in slots.items():
        if isinstance(slot, SlidingWindowMixer):
            slot.attention.load_state_dict(attention_of(theirs[index]).state_dict())
            seeded[index] = [Seeded("attention", "the teacher's own, all of it")]
    for index, trace in calibrate(teacher, {index: replaced[index] for index in slots if index not in seeded}, seed):
        seeded[index] = seed_mixer(bare(slots[index]), replaced[index], trace)
    return dict(sorted(seeded.items()))


def _count_by_role(model: PreTrainedModel) -> dict[str, int]:
    counts: dict[str, int] = dict.fromkeys(ROLES, 0)
    by_name = roles(model)
    for name, parameter in model.named_parameters():
        counts[by_name[name]] += parameter.numel()
    return counts


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
