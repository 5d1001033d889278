"""A student's mixers fitted to its teacher's attention on some text, layer by layer.

    parallel      both read the teacher's states:       W Y(h) ≈ A(h)
    sequential    the student reads its own, h', which the layers below it made after they were fitted, and besides
                  attention's output it makes good what they left behind:    W Y(h') ≈ A(h) + (h − h')

Y is what a mixer's heads make, A what attention adds to the stream. In sequence a state that leaves a fitted layer's
attention is as near to the teacher's as the projection allows; that holds where a layer adds attention's output to the
stream as it is, which is looked at first. What heads that are kept beside a mixer add counts as done already. Layers of
attention behind a window are left alone; in sequence, what their window loses is for the layers above to make good.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.attention import AttentionView, views
from distill.capture import Batch, LayerTrace, as_decoder_calls, layer_traces, sequence_arguments, traced_layers
from distill.decoder import attention_of, layers_of
from distill.errors import UserError
from distill.fitting.memories import fit_memories_
from distill.fitting.outputs import OutputSums
from distill.memories import SET_MEMORY, memories_of
from distill.mixers import MIXERS, Mixer, Slot, bare, is_mixer
from distill.student import mixers_of

Order = Literal["parallel", "sequential"]
Errors = tuple[float, float]

MATRIX_TOKENS = 2048
"""Tokens whose matrices are looked at for the memories; at least one sequence."""


@dataclass(frozen=True)
class Calibrated:
    """What became of a layer.

    Attributes:
        memories: positions in which each head forgets by 1/e; None where they were left alone.
        error_before: squared error of the layer's output before the projection was fitted, relative to the target's
            square: 1 is what zeros would do; None where it was left alone.
        error_after: the same, behind it, on the same text.
    """

    memories: list[float] | None = None
    error_before: float | None = None
    error_after: float | None = None


@torch.no_grad()
def calibrate_student(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batches: Sequence[Batch],
    *,
    memories: bool = True,
    outputs: bool = True,
    layers: Order = "parallel",
    ridge: float = 1e-3,
) -> dict[int, Calibrated]:
    """Fit the mixers of a freshly converted ``student`` in place; nothing else of it changes.

    Args:
        student: with mixers that have an output projection of their own (``distill.mixers.MIXERS``), in some layers.
        teacher: the one it was converted from, on the same device.
        batches: training text, as ``Rows.batch`` gives it.
        memories: choose each head's decay, on the first ``MATRIX_TOKENS``.
        outputs: then fit the output projections.
        layers: what the mixers read; see above.
        ridge: how strongly the projection is pulled to the seeded one, relative to the size of what it reads.

    Raises:
        UserError: the mixers cannot be fitted, or in sequence, where the teacher's layers do something else with
            attention's output than to add it.
    """
    slots = mixers_of(student)
    if not slots:
        return {}
    mixers = _bare_mixers(student)
    refuse_unfitted(next(iter((mixers or slots).values())), memories)
    batches = [{name: tensor.to(student.device) for name, tensor in batch.items()} for batch in batches]
    if memories:
        _fit_memories(mixers, teacher, batches)
    fit = _in_parallel if layers == "parallel" else _in_sequence
    errors: dict[int, Errors] = dict(fit(student, teacher, batches, ridge)) if outputs else {}
    return {
        index: Calibrated(memories_of(mixer).tolist() if memories else None, *errors.get(index, (None, None)))
        for index, mixer in mixers.items()
    }


def refuse_unfitted(mixer: Slot, memories: bool) -> None:
    """Raises UserError for mixers that have nothing to fit."""
    if mixer.of_attention:
        raise UserError(
            "calibrate is not for sliding_window: its layers are attention itself, and keep the teacher's output"
            " projection as it is; leave it out"
        )
    if memories and type(mixer) not in SET_MEMORY:
        kind = next(name for name, made in MIXERS.items() if made is type(mixer))
        raise UserError(
            f"calibrate.memories is not for {kind}: its heads forget nothing, so there is no memory to choose; give"
            " memories: false"
        )


def _fit_memories(mixers: dict[int, Mixer], teacher: PreTrainedModel, batches: Sequence[Batch]) -> None:
    batch = batches[0]
    rows = max(1, MATRIX_TOKENS // batch["input_ids"].shape[1])
    read: dict[int, AttentionView] = views(teacher, mixers)
    arguments = {name: None if one is None else one[:rows] for name, one in sequence_arguments(batch).items()}
    for index, trace in traced_layers(teacher, batch, mixers, wants=["attention_input"]):
        fit_memories_(mixers[index], read[index], [(_of_rows(trace, rows), arguments)])


def _of_rows(trace: LayerTrace, rows: int) -> LayerTrace:
    """What the first rows of a batch read; the batch itself cannot be cut, since pixels are per image or per patch."""
    few, positions = LayerTrace(), trace.position_embeddings
    few.attention_input = trace.attention_input[:rows]
    few.layer_kwargs = {} if positions is None else {"position_embeddings": tuple(part[:rows] for part in positions)}
    return few


def _in_parallel(
    student: PreTrainedModel, teacher: PreTrainedModel, batches: Sequence[Batch], ridge: float
) -> Iterator[tuple[int, Errors]]:
    mixers, slots = _bare_mixers(student), mixers_of(student)
    sums = {index: _sums_for(mixer) for index, mixer in mixers.items()}
    for batch in batches:
        arguments = sequence_arguments(batch)
        for index, trace in traced_layers(teacher, batch, mixers, wants=["attention_input", "attention_output"]):
            with _watched(slots[index], mixers[index]) as seen:
                u_BTD = trace.attention_input.to(student.dtype)
                slots[index](u_BTD, position_embeddings=trace.position_embeddings, **arguments)
            sums[index].add(*_valid(batch, seen.heads, trace.attention_output - seen.others))
    for index, mixer in mixers.items():
        yield index, _fit(mixer, sums[index], ridge)


def _in_sequence(
    student: PreTrainedModel, teacher: PreTrainedModel, batches: Sequence[Batch], ridge: float
) -> Iterator[tuple[int, Errors]]:
    mixers, slots = _bare_mixers(student), mixers_of(student)
    _require_plain_sum(teacher, batches[0])
    arguments = [sequence_arguments(batch) for batch in batches]
    below = range(max(mixers) + 1)
    # Layer by layer over all batches: each walks through the teacher at its own pace and waits where it was asked last.
    walks = [traced_layers(teacher, batch, below, wants=["layer_input", "attention_output"]) for batch in batches]
    streams: list[Tensor] = []
    for index in below:
        traces = [next(walk)[1] for walk in walks]
        streams = streams or [trace.layer_input.to(student.dtype) for trace in traces]
        layer = layers_of(student)[index]
        if index in mixers:
            sums = _sums_for(mixers[index])
            for batch, trace, stream_BTD, told in zip(batches, traces, streams, arguments, strict=True):
                with _watched(slots[index], mixers[index]) as seen:
                    as_decoder_calls(layer, stream_BTD, trace, told)
                target_BTD = trace.attention_output + trace.layer_input - stream_BTD - seen.others
                sums.add(*_valid(batch, seen.heads, target_BTD))
            yield index, _fit(mixers[index], sums, ridge)
        streams = [
            as_decoder_calls(layer, stream_BTD, trace, told)
            for stream_BTD, trace, told in zip(streams, traces, arguments, strict=True)
        ]


def _sums_for(mixer: Mixer) -> OutputSums:
    return OutputSums(with_bias=mixer.out_proj.bias is not None)


def _fit(mixer: Mixer, sums: OutputSums, ridge: float) -> Errors:
    before = sums.error(mixer.out_proj)
    sums.fit_(mixer.out_proj, ridge)
    return before, sums.error(mixer.out_proj)


def _valid(batch: Batch, *tensors_BTC: Tensor) -> list[Tensor]:
    """The rows (N, C) of each tensor that are no padding."""
    return [tensor_BTC[batch["valid"]] for tensor_BTC in tensors_BTC]


def _bare_mixers(student: PreTrainedModel) -> dict[int, Mixer]:
    """The mixers to fit, without the heads that may be kept beside them; none where attention is behind a window."""
    return {index: bare(slot) for index, slot in mixers_of(student).items() if is_mixer(slot)}


@dataclass
class _Seen:
    """What stands where attention stood was seen to make.

    Attributes:
        heads: what the mixer's output projection read, (B, T, I).
        others: what was added to what it made, (B, T, D): by kept heads, else zeros.
    """

    heads: Tensor = field(init=False)
    others: Tensor = field(init=False)


@contextmanager
def _watched(slot: Any, mixer: Any) -> Iterator[_Seen]:
    """Inside, a call of ``slot``, which is the mixer or holds it, is seen."""
    seen = _Seen()

    def projected(_projection: Any, args: tuple[Tensor, ...], output_BTD: Tensor) -> None:
        seen.heads, seen.others = args[0], -output_BTD

    def made(_slot: Any, _args: Any, output: tuple[Tensor, None]) -> None:
        seen.others = seen.others + output[0]

    handles = mixer.out_proj.register_forward_hook(projected), slot.register_forward_hook(made)
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _require_plain_sum(teacher: PreTrainedModel, batch: Batch) -> None:
    """Look whether a layer adds attention's output to the stream as it is: then what one gains the other may lose.

    Raises:
        UserError: it does not (a norm or factor behind attention, an MLP beside it).
    """
    trace = layer_traces(teacher, batch, [0], wants=["layer_input", "attention_output", "layer_output"])[0]
    layer, moved_BTD = layers_of(teacher)[0], trace.layer_input.roll(1, dims=-1)  # as large as the stream, and not it

    def replaced(_attention: Any, _args: Any, output: Any) -> Any:
        output_BTD = trace.attention_output + trace.layer_input - moved_BTD
        return (output_BTD, *output[1:]) if isinstance(output, tuple) else output_BTD

    handle = attention_of(layer).register_forward_hook(replaced)
    try:
        output = layer(moved_BTD, *trace.layer_args, **trace.layer_kwargs)
    finally:
        handle.remove()
    again_BTD = output[0] if isinstance(output, tuple) else output
    if (again_BTD - trace.layer_output).norm() > 0.02 * trace.layer_output.norm():
        raise UserError(
            "student.calibrate.layers is sequential, but this teacher's layers do not add attention's output to the"
            " stream as it is (a norm or a factor stands behind it, or the MLP beside it); use parallel"
        )
