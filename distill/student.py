"""The Hugging Face class of a converted model: its teacher's own class with mixers in some layers.

A student class is made when it is first asked for: by name, as an attribute of this module (``DistilledXForCausalLM``
for any ``XForCausalLM`` of transformers), or by model type, which ``AutoConfig`` and its teacher's Auto classes know
once this module is imported (``import distill`` does). So no model file of transformers is loaded before it is needed.
A student's folder also carries the code it needs (``distill.standalone``), for environments without this package.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from distill.auto_classes import auto_class, auto_classes, stock_class
from distill.decoder import attention_of, layers_of, learns_positions
from distill.errors import UserError
from distill.layout import ATTENTION, kept_heads, mixer_layers, parts_of
from distill.mixers import Slot
from distill.standalone import auto_map, write_code
from distill.student_base import Student
from distill.vision import FAMILIES as VISION
from distill.vision import require_known

MODEL_TYPE = "distilled_"
CLASS_NAME = "Distilled"
_DROPOUT = ("dropout", "pdrop")


def save_with_code(
    student: PreTrainedModel, save_directory: str | Path, is_main_process: bool = True, *args: Any, **kwargs: Any
) -> None:
    """Save as any Hugging Face model, plus the code that loads the folder without this package."""
    if is_main_process:  # before the weights: with push_to_hub the folder is uploaded when they are written
        write_code(Path(save_directory), type(student), parts_of(student.config.distill))
    student.config.auto_map = auto_map(type(student))
    PreTrainedModel.save_pretrained(student, save_directory, is_main_process, *args, **kwargs)


def teacher_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The stock class of a teacher's config, or the one that a student's class is made from.

    Raises:
        UserError: transformers has no causal language model for it.
    """
    require_known(config)
    layout = getattr(config, "distill", None)
    model_type = layout["teacher"] if layout else config.model_type
    found = stock_class(model_type, CONFIG_MAPPING[model_type] if layout else type(config))
    if found is None:
        raise UserError(f"transformers has no causal language model of the type {config.model_type!r}")
    return found


def student_class(teacher: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The student class of a teacher's class, made known to transformers: ``DistilledLlamaForCausalLM``."""
    name = f"{CLASS_NAME}{teacher.__name__}"
    if name not in globals():
        assert teacher.config_class is not None
        config = student_config_class(teacher.config_class)
        values = {
            "config_class": config,
            "save_pretrained": save_with_code,
            "__module__": __name__,
            "__doc__": Student.__doc__,
        }
        made = globals()[name] = type(name, (Student, teacher), values)
        AutoConfig.register(config.model_type, config, exist_ok=True)
        for auto in auto_classes(teacher):
            auto.register(config, made, exist_ok=True)
    return globals()[name]


def student_config_class(stock: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The config class of a student of the teachers that have ``stock``: ``DistilledLlamaConfig``."""
    name = f"{CLASS_NAME}{stock.__name__}"
    if name not in globals():
        values = {"model_type": f"{MODEL_TYPE}{stock.model_type}", "__module__": __name__}
        globals()[name] = type(name, (stock,), values)
    return globals()[name]


def __getattr__(name: str) -> type:
    """A student's classes by name, for pickling and for loading a folder with its own code."""
    stock = getattr(transformers, name.removeprefix(CLASS_NAME), None) if name.startswith(CLASS_NAME) else None
    if isinstance(stock, type) and issubclass(stock, PreTrainedModel):
        return student_class(stock)
    if isinstance(stock, type) and issubclass(stock, PreTrainedConfig):
        return student_config_class(stock)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _OnDemand(dict[str, Any]):
    """Config classes by model type, beside transformers' own: a student's is made when it is looked up."""

    def __contains__(self, model_type: object) -> bool:
        return super().__contains__(model_type) or _teacher_type(model_type) is not None

    def __missing__(self, model_type: str) -> type[PreTrainedConfig]:
        teacher = _teacher_type(model_type)
        if teacher is None:
            raise KeyError(model_type)
        made = student_class(stock_class(teacher, CONFIG_MAPPING[teacher]))
        assert made.config_class is not None
        return made.config_class


def _teacher_type(model_type: object) -> str | None:
    """The model type that a student's is made of; None for any other."""
    name = str(model_type).removeprefix(MODEL_TYPE)
    known = name in VISION or name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return name if name != model_type and known else None


# Registering a class is all that transformers offers; one that does not exist yet can only stand in its own table.
CONFIG_MAPPING._extra_content = _OnDemand(CONFIG_MAPPING._extra_content)


def student_config(
    teacher: PreTrainedConfig,
    layers: Sequence[str],
    mixer: dict[str, Any],
    heads: dict[int, dict[str, Any]] | None = None,
) -> PreTrainedConfig:
    """A student's config: its teacher's, with the layout under a key of our own.

    The teacher's name is left out: trainers that reload ``config._name_or_path`` as a reference model (TRL) would
    silently get the teacher. Dropout is off (GPT-2's configs have it on), in the configs of its parts too: a student is
    to match its teacher, and a loss that is computed again has to be the same.
    """
    values = _without_dropout(copy.deepcopy(teacher.to_dict()))
    for key in ("model_type", "architectures", "_name_or_path", "transformers_version", "auto_map"):
        values.pop(key, None)
    layout = {"version": 1, "layers": list(layers), "mixer": dict(mixer), "teacher": teacher.model_type}
    if heads:
        layout["heads"] = {str(index): kept for index, kept in heads.items()}
    return student_config_class(type(teacher))(**values, distill=layout)  # type: ignore[call-arg]


def _without_dropout(values: dict[str, Any]) -> dict[str, Any]:
    """The same settings with a rate of 0 for every dropout, also in those of a text or vision part."""
    off = {key: 0.0 for key, value in values.items() if isinstance(value, float) and key.endswith(_DROPOUT)}
    parts = {key: _without_dropout(value) for key, value in values.items() if isinstance(value, dict)}
    return {**values, **off, **parts}


def load_student(folder: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load a student saved by ``save_pretrained``; as ``AutoModelForCausalLM.from_pretrained(folder)``, but strict.

    Args:
        folder: an ordinary Hugging Face folder.
        **kwargs: passed on, e.g. ``dtype``, ``device_map``.

    Raises:
        UserError: weights are missing, or the folder holds another model.
    """
    student = load_model(folder, **kwargs)
    if not is_student(student):
        raise UserError(f"{folder} holds a {type(student).__name__}, not a student; convert it first")
    return student


def load_model(folder: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load a student or a stock model. Transformers fills weights that a folder lacks at random; here that is an error.

    Raises:
        UserError: naming what is missing or of another shape.
    """
    auto = auto_class(AutoConfig.from_pretrained(folder))
    loaded: Any = auto.from_pretrained(folder, output_loading_info=True, **kwargs)
    model, account = loaded
    lacking = sorted(str(name) for key in ("missing_keys", "mismatched_keys") for name in account.get(key) or ())
    if lacking:
        shown = ", ".join(lacking[:5]) + (f" and {len(lacking) - 5} more" if len(lacking) > 5 else "")
        raise UserError(f"{folder} lacks weights of its model, or has them in another shape: {shown}")
    return model


def reads_any_length(model: PreTrainedModel) -> bool:
    """Whether nothing in a model counts positions: a student of mixers alone, whose family learns none."""
    layout = getattr(model.config, "distill", None)
    if layout is None or ATTENTION in layout["layers"] or kept_heads(model.config):
        return False
    return not learns_positions(model)


def is_student(model: PreTrainedModel) -> bool:
    return getattr(model.config, "distill", None) is not None


def mixers_of(student: PreTrainedModel) -> dict[int, Slot]:
    """The mixers of a student by layer index, with what stands beside them."""
    layers = layers_of(student)
    return {index: attention_of(layers[index]) for index in mixer_layers(student.config)}


def state_bytes(student: PreTrainedModel, dtype: torch.dtype | None = None) -> int:
    """Bytes all mixers remember per sequence, at any context length.

    Args:
        student: may be without weights.
        dtype: of the weights it is to have, where it has not these; states are at least fp32 all the same.
    """
    return sum(mixer.state_bytes(dtype or student.dtype) for mixer in mixers_of(student).values())
