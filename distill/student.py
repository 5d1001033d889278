"""The Hugging Face class of a converted model: its teacher's own class with mixers in some layers.

Importing this module (``import distill`` does) registers the classes, so that ``AutoModelForCausalLM`` loads a
student's folder. The folder also carries the code it needs (``distill.standalone``), for environments without this
package.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from distill.attention import FAMILIES, Family
from distill.errors import UserError
from distill.layout import mixer_layers
from distill.mixers import Mixer
from distill.standalone import auto_map, write_code
from distill.student_base import Student


def save_with_code(
    student: PreTrainedModel, save_directory: str | Path, is_main_process: bool = True, *args: Any, **kwargs: Any
) -> None:
    """Save as any Hugging Face model, plus the code that loads the folder without this package."""
    if is_main_process:  # before the weights: with push_to_hub the folder is uploaded when they are written
        write_code(Path(save_directory), type(student), student.config.distill["layers"])
    student.config.auto_map = auto_map(type(student))
    PreTrainedModel.save_pretrained(student, save_directory, is_main_process, *args, **kwargs)


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
        {
            "config_class": config,
            "save_pretrained": save_with_code,
            "__module__": __name__,
            "__doc__": Student.__doc__,
        },
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
    student = load_model(folder, **kwargs)
    if not is_student(student):
        raise UserError(f"{folder} holds a {type(student).__name__}, not a student; convert it first")
    return student


def load_model(folder: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load a student or a stock model. Transformers fills weights that a folder lacks at random; here that is an error.

    Raises:
        UserError: naming what is missing or of another shape.
    """
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **kwargs)
    model, account = loaded
    lacking = sorted(str(name) for key in ("missing_keys", "mismatched_keys") for name in account.get(key) or ())
    if lacking:
        shown = ", ".join(lacking[:5]) + (f" and {len(lacking) - 5} more" if len(lacking) > 5 else "")
        raise UserError(f"{folder} lacks weights of its model, or has them in another shape: {shown}")
    return model


def is_student(model: PreTrainedModel) -> bool:
    return getattr(model.config, "distill", None) is not None


def mixers_of(student: PreTrainedModel) -> dict[int, Mixer]:
    """The mixers of a student by layer index."""
    layers = student.get_decoder().layers
    return {index: layers[index].self_attn for index in mixer_layers(student.config)}


def state_bytes(student: PreTrainedModel, dtype: torch.dtype = torch.float32) -> int:
    """Bytes all mixers remember per sequence, at any context length."""
    return sum(mixer.state_numel() for mixer in mixers_of(student).values()) * dtype.itemsize
