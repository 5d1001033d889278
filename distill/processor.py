"""A vision-language teacher's processor: what makes images and text into a model's inputs, and where it is kept."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.errors import UserError
from distill.vision import is_vision

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
BESIDE = (*PROCESSOR_FILES, "video_preprocessor_config.json", "chat_template.jinja", "chat_template.json")


def read_processor(path: Path | str, settings: dict[str, Any] | None = None) -> Any:
    """The processor of a model folder or Hub id, with some settings of its own replaced.

    Raises:
        UserError: there is none, or a package that it needs is missing; the message names it.
    """
    from transformers import AutoProcessor

    folder = Path(path).expanduser()
    if folder.is_dir() and not has_processor(folder):
        raise UserError(f"{path} has no processor: none of {', '.join(PROCESSOR_FILES)}; images cannot be read with it")
    try:
        processor: Any = AutoProcessor.from_pretrained(path, **(settings or {}))
    except ImportError as error:
        needed = "Pillow, and for Qwen-VL and SmolVLM torchvision and num2words: pip install 'distill-ssm[vision]'"
        raise UserError(f"the processor of {path} needs {needed} ({_first_line(error)})") from None
    except Exception as error:  # json, tokenizers and transformers each raise their own
        raise UserError(f"the processor of {path} cannot be read: {_first_line(error)}") from None
    if getattr(processor, "tokenizer", None) is None:  # AutoProcessor falls back to a tokenizer, or an image processor
        raise UserError(f"{path} has a {type(processor).__name__} and no processor of images and text")
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token  # any id will do: the mask keeps it out
    return processor


def processor_for_images(folder: Path, config: "PreTrainedConfig") -> Any:
    """The processor of a student or teacher that shall read images.

    Raises:
        UserError: it is no vision-language model, or has no processor.
    """
    if not is_vision(config):
        raise UserError(f"{folder} holds a {config.model_type}, which reads no images; leave --image out")
    return read_processor(folder)


def has_processor(folder: Path) -> bool:
    return any((folder / name).is_file() for name in PROCESSOR_FILES)


def copy_processor(teacher: Path | str, folder: Path) -> None:
    """Put the files of a teacher's processor into a student's folder, as they are; nothing where there are none."""
    source = Path(teacher).expanduser()
    if not source.is_dir():
        read_processor(teacher).save_pretrained(folder)
        return
    for name in BESIDE:
        if (source / name).is_file():
            shutil.copy(source / name, folder)


def image_token_id(config: "PreTrainedConfig") -> int:
    """The placeholder of an image feature in a vision-language model's vocabulary."""
    return int(config.image_token_id)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
