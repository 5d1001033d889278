"""The Hugging Face class of a converted model: its teacher's own class with mixers in some layers.

Importing this module (``import distill`` does) registers the classes, so that ``AutoModelForCausalLM`` loads a
student's folder. The folder also carries the code it needs (``distill.standalone``), for environments without this
package. What a student adds to its teacher's class is one hook before the decoder runs: it reads the padding mask and
the positions, which layers below only see after they were turned into an attention mask, and makes room in the cache.
"""

import copy
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from distill.attention import FAMILIES, Family
from distill.cache import adopt
from distill.documents import document_starts, positions_from_index
from distill.errors import UserError
from distill.layout import ATTENTION
from distill.mixers import MIXERS, Mixer


class Student:
    """What every student class adds to its teacher's class.

    ``config.distill`` holds ``layers`` (one name a layer: ``"attention"`` or a mixer's) and ``mixer`` (the arguments
    the mixers are built with).
    """

    # A state cannot be rolled back, which assisted generation would need: generate refuses it by this flag.
    _is_stateful = True
    # The count of tokens in the cache is a Python number, which a compiled step would be specialised on.
    _can_compile_fullgraph = False

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        install_mixers(self, config.distill)  # type: ignore[arg-type]

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
        """Leave the 2-D mask as it is: ``generate`` would make it 4-D for static caches, which mixers cannot read."""
        return attention_mask

    def save_pretrained(
        self, save_directory: str | Path, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """Save as any Hugging Face model, plus the code that loads the folder without this package."""
        from distill.standalone import auto_map, write_code

        if is_main_process:  # before the weights: with push_to_hub the folder is uploaded when they are written
            write_code(Path(save_directory))
        self.config.auto_map = auto_map(type(self))  # type: ignore[attr-defined, arg-type]
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)  # type: ignore[misc]


def install_mixers(model: PreTrainedModel, layout: dict[str, Any]) -> None:
    """Put mixers where the layout says, in place, and let the decoder prepare what they read."""
    decoder = model.get_decoder()
    places = mixer_layers(model.config)
    for index in places:
        layer = decoder.layers[index]
        mixer = MIXERS[layout["layers"][index]](
            hidden_size=model.config.get_text_config().hidden_size, layer_idx=index, **layout["mixer"]
        )
        layer.self_attn = mixer.to(dtype=model.dtype)
    # Also where all attention is kept: whether packed documents stay apart must not depend on the layout.
    decoder.register_forward_pre_hook(prepare_sequence, with_kwargs=True)


def mixer_layers(config: PreTrainedConfig) -> list[int]:
    """Indices of the layers whose attention a mixer replaced."""
    return [index for index, kind in enumerate(config.distill["layers"]) if kind != ATTENTION]


def prepare_sequence(decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
    """Before the decoder runs: find padding and document borders for the mixers, and make room in the cache.

    Raises:
        ValueError: for inputs that some layer would silently mix up: a 4-D mask, padding between tokens, packed
            documents together with a cache or with a padding mask.
    """
    names = list(inspect.signature(decoder.forward).parameters)
    kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    tokens = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
    length = tokens.shape[1]

    valid_BT = _valid_positions(kwargs.get("attention_mask"), length)
    if (seq_idx_BT := kwargs.pop("seq_idx", None)) is not None and kwargs.get("position_ids") is None:
        kwargs["position_ids"] = positions_from_index(seq_idx_BT)
    position_ids = kwargs.get("position_ids")
    resets_BT = None if position_ids is None else document_starts(position_ids, valid_BT)
    if resets_BT is not None:
        _isolate_documents(kwargs, valid_BT)
        resets_BT = resets_BT.expand(tokens.shape[0], -1)
    _prepare_cache(decoder, kwargs)
    return (), {**kwargs, "valid_BT": valid_BT, "resets_BT": resets_BT}


def _valid_positions(attention_mask: Any, length: int) -> Tensor | None:
    """The last ``length`` columns of a padding mask as booleans; None where nothing is padded."""
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        raise ValueError(
            "attention_mask must be 2-D (batch, tokens) with 1 for tokens and 0 for padding: a mixer cannot follow "
            "an arbitrary 4-D mask. Packed documents are kept apart by position_ids."
        )
    if bool(attention_mask.all()):
        return None
    _refuse_gaps(attention_mask.bool())
    return attention_mask[:, -length:].bool()


def _refuse_gaps(mask_BT: Tensor) -> None:
    """A convolution that skips padding would need to look past it; padding may stand before or behind the tokens."""
    starts_B = F.pad(mask_BT, (1, 0)).int().diff(dim=1).eq(1).sum(dim=1)
    if bool((starts_B > 1).any()):
        raise ValueError(
            "attention_mask has padding between tokens of one sequence; a mixer's convolution cannot skip it. Pad on "
            "the left (or on the right), or run the sequences one by one."
        )


def _isolate_documents(kwargs: dict[str, Any], valid_BT: Tensor | None) -> None:
    """Attention layers keep packed documents apart only without mask and cache; make it so or say why not."""
    if kwargs.get("past_key_values") is not None:
        raise ValueError(
            "position_ids say that several documents are packed into a row, and a cache was passed: attention layers "
            "would see across documents. Call without past_key_values, or give one document a row."
        )
    if valid_BT is not None:
        raise ValueError(
            "position_ids say that several documents are packed into a row, and attention_mask has padding: attention "
            "layers would see across documents. Leave attention_mask out (let padding restart the positions instead)."
        )
    kwargs["attention_mask"] = None
    kwargs["use_cache"] = False


def _prepare_cache(decoder: Any, kwargs: dict[str, Any]) -> None:
    cache = kwargs.get("past_key_values")
    use_cache = kwargs.get("use_cache")
    if use_cache is None:
        use_cache = decoder.config.use_cache
    if cache is None and use_cache and not (decoder.training and decoder.gradient_checkpointing):
        cache = DynamicCache(config=decoder.config)
    if isinstance(cache, Cache):
        kwargs["past_key_values"] = adopt(cache, mixer_layers(decoder.config))


def student_class(family: Family) -> type[PreTrainedModel]:
    """The student class of a teacher's class: ``DistilledLlamaForCausalLM`` for ``LlamaForCausalLM``."""
    teacher, stock = family.causal_lm, _config_class(family.causal_lm)
    config = type(
        f"Distilled{stock.__name__}",
        (stock,),
        {"model_type": f"distilled_{stock.model_type}", "__module__": __name__},
    )
    return type(
        f"Distilled{teacher.__name__}",
        (Student, teacher),
        {"config_class": config, "__module__": __name__, "__doc__": Student.__doc__},
    )


def _config_class(model_class: type[PreTrainedModel]) -> type[PreTrainedConfig]:
    assert model_class.config_class is not None
    return model_class.config_class


STUDENTS: dict[str, type[PreTrainedModel]] = {name: student_class(family) for name, family in FAMILIES.items()}
for _class in STUDENTS.values():
    # As attributes of the module, so that pickling and remote-code loading find them by name.
    globals().update({made.__name__: made for made in (_class, _config_class(_class))})
    AutoConfig.register(_config_class(_class).model_type, _config_class(_class), exist_ok=True)
    AutoModelForCausalLM.register(_config_class(_class), _class, exist_ok=True)


def student_config(teacher: PreTrainedConfig, layers: Sequence[str], mixer: dict[str, Any]) -> PreTrainedConfig:
    """A student's config: its teacher's, with the layout under a key of our own.

    The teacher's name is left out: trainers that reload ``config._name_or_path`` as a reference model (TRL) would
    silently get the teacher.
    """
    values = copy.deepcopy(teacher.to_dict())
    for key in ("model_type", "architectures", "_name_or_path", "transformers_version", "auto_map"):
        values.pop(key, None)
    layout = {"version": 1, "layers": list(layers), "mixer": dict(mixer), "teacher": teacher.model_type}
    return _config_class(STUDENTS[teacher.model_type])(**values, distill=layout)  # type: ignore[call-arg]


def load_student(folder: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load a student saved by ``save_pretrained``; as ``AutoModelForCausalLM.from_pretrained(folder)``, but strict.

    Args:
        folder: an ordinary Hugging Face folder.
        **kwargs: passed on, e.g. ``dtype``, ``device_map``.

    Raises:
        UserError: weights are missing, or the folder holds another model.
    """
    student, loading = load_with_account(folder, **kwargs)
    refuse_missing(folder, loading)
    if not is_student(student):
        raise UserError(f"{folder} holds a {type(student).__name__}, not a student; convert it first")
    return student


def load_with_account(folder: str | Path, **kwargs: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """``AutoModelForCausalLM.from_pretrained``, and which weights it found, missed or could not use."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **kwargs)
    model, loading = loaded
    return model, loading


def refuse_missing(folder: str | Path, loading: dict[str, Any]) -> None:
    """Transformers fills weights that a folder lacks at random, with a warning; here that is an error.

    Raises:
        UserError: naming what is missing or of another shape.
    """
    lacking = sorted(str(name) for key in ("missing_keys", "mismatched_keys") for name in loading.get(key) or ())
    if lacking:
        shown = ", ".join(lacking[:5]) + (f" and {len(lacking) - 5} more" if len(lacking) > 5 else "")
        raise UserError(f"{folder} lacks weights of its model, or has them in another shape: {shown}")


def is_student(model: PreTrainedModel) -> bool:
    return getattr(model.config, "distill", None) is not None


def mixers_of(student: PreTrainedModel) -> dict[int, Mixer]:
    """The mixers of a student by layer index."""
    layers = student.get_decoder().layers
    return {index: layers[index].self_attn for index in mixer_layers(student.config)}


def state_bytes(student: PreTrainedModel, dtype: torch.dtype = torch.float32) -> int:
    """Bytes all mixers remember per sequence, at any context length."""
    return sum(mixer.state_numel() for mixer in mixers_of(student).values()) * dtype.itemsize
