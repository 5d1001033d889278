"""Whether a teacher is what its view says: tried on a few tokens before anything is converted.

Attention is recomputed from the view, softmax(mask(cap(scaling · q kᵀ))) v, and compared with what the module itself
gave on the same input, in every layer that will change: once over one document, once over two in a row. So a mask in
both directions, a bias on the scores, a rotation that is done otherwise or documents that see each other are found, in
a family with a row and in one without. What it cannot find lies beyond its few tokens, such as a window of thousands.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.attention import AttentionView
from distill.capture import LayerTrace, traced_layers
from distill.decoder import attention_of, layers_of
from distill.documents import document_starts
from distill.errors import UserError
from distill.families import family_name
from distill.student import mixers_of

LENGTH = 40
ALLOWED = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""Of the largest output, by the dtype in which a module computes its own."""
ALLOWED_EAGER_DOUBLE = 1e-6
"""In fp64 with eager attention: transformers takes the softmax of that in fp32 whatever it is given."""


@torch.no_grad()
def verify(teacher: PreTrainedModel, attention: dict[int, AttentionView]) -> dict[int, float]:
    """How far each layer's attention, recomputed through its view, is from its own output; relative to the largest.

    Raises:
        UserError: naming family, layer and error, where it is more than rounding.
    """
    batch, errors = _batch(teacher), dict[int, float]()
    with _counted(teacher, attention) as returned:
        for index, trace in traced_layers(teacher, batch, attention, wants=["attention_input", "attention_output"]):
            where = f"layer {index} of this {family_name(teacher.config)} cannot be converted"
            try:
                alone, packed = _errors(attention[index], trace, batch["position_ids"])
            except Exception as error:  # a norm, a rotation or a cap that is called otherwise fails in its own way
                raise UserError(f"{where}: its attention is not computed as others': {error}") from error
            allowed = _allowed(teacher, trace.attention_output.dtype)
            if (reason := _refusal(alone, packed, allowed, returned[index])) is not None:
                raise UserError(f"{where}: {reason}")
            errors[index] = max(alone, packed)
    return errors


def _allowed(teacher: PreTrainedModel, dtype: torch.dtype) -> float:
    eager = teacher.config.get_text_config()._attn_implementation == "eager"
    return ALLOWED_EAGER_DOUBLE if eager and dtype == torch.float64 else ALLOWED[dtype]


def _refusal(alone: float, packed: float, allowed: float, returned: int) -> str | None:
    if returned != 2:
        return f"its attention returns {returned} things, and a mixer two"
    if not alone <= allowed:
        return (
            f"its attention, recomputed from its weights, is off by {alone:.1g} of its size ({allowed:g} is allowed):"
            " it is more than projections, norms, rotation, causal mask, window and cap; take a teacher of another"
            " family, or give this one a row in distill/families.py"
        )
    if not packed <= allowed:
        return f"documents packed into a row see each other although their positions restart (off by {packed:.1g})"
    return None


def _batch(teacher: PreTrainedModel) -> dict[str, Tensor]:
    """Random tokens: a row that is one document, and a row of two."""
    text, generator = teacher.config.get_text_config(), torch.Generator().manual_seed(0)
    length = min(LENGTH, getattr(text, "max_position_embeddings", LENGTH))
    first = 2 * length // 5
    ids_BT = torch.randint(text.vocab_size, (2, length), generator=generator)
    positions_BT = torch.stack([torch.arange(length), torch.cat([torch.arange(first), torch.arange(length - first)])])
    batch = {"input_ids": ids_BT, "position_ids": positions_BT}
    return {name: tensor.to(teacher.device) for name, tensor in batch.items()}


def _errors(attention: AttentionView, trace: LayerTrace, position_ids_BT: Tensor) -> tuple[float, float]:
    """Of the row that is one document, and of the row of two."""
    starts_BT = document_starts(position_ids_BT)
    assert starts_BT is not None
    matrix_BHTT = attention.matrix(trace.attention_input, trace.position_embeddings, starts_BT.cumsum(1))
    v_BTHP = attention.values(trace.attention_input)
    mixed_BTHP = torch.einsum("bhts,bshp->bthp", matrix_BHTT, v_BTHP.to(matrix_BHTT.dtype)).to(v_BTHP.dtype)
    expected_BTD = trace.attention_output
    differences_B = (attention.o(mixed_BTHP.flatten(2)) - expected_BTD).abs().amax(dim=(1, 2))
    alone, packed = (differences_B / expected_BTD.abs().amax(dim=(1, 2))).tolist()
    return alone, packed


@contextmanager
def _counted(teacher: PreTrainedModel, layers: Iterable[int]) -> Iterator[dict[int, int]]:
    """Inside, how many things each layer's attention returned last."""
    counts: dict[int, int] = {}

    def count(index: int) -> Any:
        def hook(_attention: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            counts[index] = len(output) if isinstance(output, tuple) else 1

        return hook

    handles = [attention_of(layers_of(teacher)[index]).register_forward_hook(count(index)) for index in layers]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def verify_delivery(student: PreTrainedModel) -> None:
    """That a student's mixers are given the cache and the padding, however its decoder calls its layers.

    Raises:
        UserError: naming the family.
    """
    seen: list[dict[str, Any]] = []

    def look(_mixer: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(kwargs)

    mixers: list[Any] = list(mixers_of(student).values())
    handles = [mixer.register_forward_pre_hook(look, with_kwargs=True) for mixer in mixers]
    ids_BT = torch.arange(4, device=student.device)[None]
    try:
        student(input_ids=ids_BT, attention_mask=ids_BT.clamp(max=1), use_cache=True)
    finally:
        for handle in handles:
            handle.remove()
    if len(seen) != len(mixers) or any(kwargs.get(name) is None for kwargs in seen for name in ("cache", "valid_BT")):
        raise UserError(
            f"this {family_name(student.config)} cannot be converted: its layers hand neither keyword arguments nor"
            " position_ids and a cache to their attention, so that a mixer would not know of padding"
        )
