"""How a teacher with windows in some layers (``distill.windowed``) is spelled where a program takes a MODEL.

    teachers/stdlib-1m@window=64,layers=0-2               layers 0 to 2 see the last 64 tokens and 4 sinks
    teachers/stdlib-1m@window=64,sinks=0,layers=0-2+5     no sinks; layer 5 too
    teachers/stdlib-1m@window=64,layers=all
    teachers/stdlib-1m@like=runs/quickstart/logits        where that student has mixers; as many bytes as its state
    teachers/stdlib-1m@like=runs/quickstart/logits,window=128

A folder whose own name has an @ in it is that folder.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from distill import handover
from distill.conversion import empty_model
from distill.errors import UserError
from distill.window import SINKS, Window
from distill.windowed import matching_window
from eval import words

KEYS = ("window", "sinks", "layers", "like")


def folder_of(path: str) -> str:
    """The model's own folder or hub id, without a window."""
    folder, mark, _ = path.partition("@")
    return path if not mark or Path(path).is_dir() else folder


def names_for(path: str) -> list[str]:
    """What tables may call a model, from the shortest to its whole path.

    Its folder's name, or its run's where it is a stage of one, and its window.
    """
    folder, rule = folder_of(path), read(path)
    names = [folder]
    if (place := Path(folder)).is_dir():
        place = place.resolve()
        longer = f"{place.parent.name}/{place.name}"
        names = [place.parent.name, longer] if handover.is_there(place) else [place.name, longer]
    if rule is not None:
        names = [f"{names[0]}, {rule}", f"{names[0]}, {rule} in {words.counted_layers(rule.layers)}"]
    return [*names, path]


def read(path: str) -> Window | None:
    """The window behind a model's path; None where there is none.

    Raises:
        UserError: it is not spelled as above, or the folders it names cannot be read.
    """
    folder = folder_of(path)
    if folder == path:
        return None
    given = _settings(path, path[len(folder) + 1 :])
    config = _config(folder, path)
    sinks = _number(path, given, "sinks", 0) if "sinks" in given else SINKS
    if "like" in given:
        like = _config(given["like"], path)
        try:
            rule = matching_window(_as_stored(config), _as_stored(like), sinks=sinks)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        return Window(rule.layers, _number(path, given, "window", 1) if "window" in given else rule.window, sinks)
    layers = _layers(path, given["layers"], config.get_text_config().num_hidden_layers)
    return Window(layers, _number(path, given, "window", 1), sinks)


def _settings(path: str, text: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in text.split(",")]
    given = {key.strip(): value.strip() for key, _, value in pairs}
    strange = [key for key in given if key not in KEYS]
    if strange or len(given) < len(pairs) or not all(given.values()):
        raise UserError(f"{path}: behind @ stand {', '.join(KEYS)}, each once and with a value: {_EXAMPLE}")
    if ("like" in given) == ("layers" in given) or not ("like" in given or "window" in given):
        raise UserError(f"{path}: give window and layers, or like, a student's folder: {_EXAMPLE}")
    return given


def _number(path: str, given: dict[str, str], key: str, least: int) -> int:
    if not given[key].isdecimal() or int(given[key]) < least:
        raise UserError(f"{path}: {key}={given[key]} is no whole number from {least} on")
    return int(given[key])


def _layers(path: str, text: str, depth: int) -> tuple[int, ...]:
    """``0-2+5`` or ``all``."""
    if text == "all":
        return tuple(range(depth))
    found: list[int] = []
    for part in text.split("+"):
        first, _, last = part.partition("-")
        last = last or first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last) < depth):
            raise UserError(f"{path}: layers={text}; write all, or as 0-2+5, layers from 0 to {depth - 1}")
        found.extend(range(int(first), int(last) + 1))
    return tuple(sorted(set(found)))


def _config(folder: str, path: str) -> PreTrainedConfig:
    if not (Path(folder).expanduser() / "config.json").is_file() and (Path(folder).is_dir() or folder.count("/") != 1):
        raise UserError(f"{path}: {folder} is no model folder")
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: {folder} has no config that can be read ({str(error).partition(chr(10))[0]})"
        ) from error


def _as_stored(config: PreTrainedConfig) -> PreTrainedModel:
    """A model without weights in the dtype that these have in its folder, in which ``eval.loading`` loads them."""
    model: Any = empty_model(config)
    return model.to(getattr(config, "dtype", None) or torch.float32)


_EXAMPLE = "FOLDER@window=64,sinks=4,layers=0-2 or FOLDER@like=STUDENT"
