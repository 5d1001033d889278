"""What is particular about a vision-language model: it is a decoder with more around it.

    model                                 logits = head(hidden)
      .base_model   the trunk             hidden = decoder(text embeddings, image features in the placeholders' places)
        .vision_tower, .connector, …      image features
        .get_decoder()                    the text decoder, whose layers convert as in any other model

Of a text model the trunk is the decoder. All that a processor returns goes into the trunk; masks, image features and
positions reach the decoder ready made. In Qwen-VL a position is three numbers (time, row, column), all the same within
text, that stand still or jump inside an image, so they say nothing of where a document begins.
"""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig

from distill.errors import UserError

NOT_FOR_MODELS = ("labels", "valid", "teacher_ids", "teacher_log_probs", "teacher_log_tail")
"""Entries of a batch that objectives read."""

_PIXELS = ("pixel_values", "pixel_attention_mask")

FAMILIES = ("gemma3", "idefics3", "llava", "paligemma", "qwen2_5_vl", "qwen2_vl", "smolvlm")
"""Model types that were tried; what another does with its images between trunk and decoder is not known."""

_BOTH_WAYS = {
    "paligemma": "the image and the prompt, up to the answer",
    "gemma3": "the tokens of an image",
}


def is_vision(config: PreTrainedConfig) -> bool:
    """Whether a model of this config reads images."""
    return getattr(config, "vision_config", None) is not None


def trunk_of(model: Any) -> Any:
    """What makes a batch into final hidden states: the decoder, or what stands around it and feeds it images."""
    return model.base_model if is_vision(model.config) else model.get_decoder()


def read_both_ways(config: PreTrainedConfig) -> str | None:
    """What the attention of a teacher reads in both directions, which no mixer can; None if nothing."""
    return _BOTH_WAYS.get(_model_type(config))


def refuse_both_ways(config: PreTrainedConfig) -> None:
    """Raises UserError for a teacher whose attention a mixer, which reads from left to right, cannot match."""
    reads = read_both_ways(config)
    if reads is not None:
        raise UserError(
            f"attention in a {config.model_type} reads {reads} in both directions, in every layer; a mixer reads from"
            " left to right. With student.bidirectional: causal (--bidirectional causal) the layers are converted all"
            " the same: mixers then learn from what attention says, but see no token before its turn; layers that keep"
            " attention read as before"
        )


def require_known(config: PreTrainedConfig) -> None:
    """Raises UserError for a vision-language model of another family than FAMILIES."""
    if is_vision(config) and _model_type(config) not in FAMILIES:
        raise UserError(
            f"the teacher is a vision-language model of the type {config.model_type!r}; supported are"
            f" {', '.join(FAMILIES)}"
        )


def _model_type(config: PreTrainedConfig) -> str:
    return str(config.model_type).removeprefix("distilled_")


def has_images(batch: Mapping[str, Tensor]) -> bool:
    """Whether a batch is of image-text rows; in one of packed text positions restart with every document."""
    return "position_ids" not in batch


def model_arguments(config: PreTrainedConfig, batch: Any, features: Any = None) -> dict[str, Any]:
    """What a trunk, or a model, is called with for a batch.

    Args:
        config: the model's.
        batch: of packed text (``distill.data.Blocks``): input_ids and position_ids (B, T); or of image-text rows
            (``distill.data.image_text``): input_ids and valid (B, T), and whatever the family's processor adds.
        features: of the batch's images, where another model has made them (``shared_features``).
    """
    if has_images(batch):
        left_out = NOT_FOR_MODELS if features is None else (*NOT_FOR_MODELS, *_PIXELS)
        given = {name: tensor for name, tensor in batch.items() if name not in left_out}
        if features is not None:
            given["mm_encoder_outputs"] = {"image": features}
        return {**given, "attention_mask": batch["valid"].long()}
    # Without a mask: only so do attention layers keep packed documents apart.
    return {"input_ids": batch["input_ids"], "position_ids": packed_positions(config, batch["position_ids"])}


def shared_features(student: Any, teachers_output: Any) -> Any:
    """The image features of a teacher's trunk, for its student's; None where the student must make its own.

    Where tower and connector are frozen they are the teacher's, and so are their features, in the teacher's precision.
    """
    trunk = trunk_of(student)
    if not is_vision(student.config) or any(parameter.requires_grad for parameter in _around_decoder(student)):
        return None
    takes_them = "mm_encoder_outputs" in inspect.signature(type(trunk).forward).parameters
    return getattr(teachers_output, "image_outputs", None) if takes_them else None


def _around_decoder(model: Any) -> Iterator[nn.Parameter]:
    """The parameters of a trunk outside of its decoder."""
    inside = {id(parameter) for parameter in model.get_decoder().parameters()}
    return (parameter for parameter in trunk_of(model).parameters() if id(parameter) not in inside)


def for_lack_of_images(model: Any, batch: Mapping[str, Tensor]) -> Tensor | float:
    """0, with a gradient of zeros for what only images reach and is trained, where a batch has none.

    Processes whose batches have images wait for the gradients of those whose batches have not.
    """
    if not is_vision(model.config) or "pixel_values" in batch:
        return 0.0
    trained = (parameter for parameter in _around_decoder(model) if parameter.requires_grad)
    return sum((0.0 * parameter.sum() for parameter in trained), 0.0)


def packed_positions(config: PreTrainedConfig, position_ids_BT: Tensor) -> Tensor:
    """Positions as the decoder wants them to keep packed documents apart.

    With M-RoPE that is (4, B, T): the token's place in its document, which masks are made from, and the three that
    are rotated by. From (B, T) alone such a decoder makes no mask, and documents leak.
    """
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    if "mrope_section" not in rope or position_ids_BT.ndim != 2:
        return position_ids_BT
    return position_ids_BT.expand(4, *position_ids_BT.shape)


def places(position_ids: Tensor | None) -> Tensor | None:
    """(B, T) places of tokens in their documents, from positions of any kind; None where they do not say."""
    if position_ids is None or position_ids.ndim == 2:
        return position_ids
    return position_ids[0] if position_ids.shape[0] == 4 else None
