"""Which model an adapter belongs to, told without loading either.

An adapter written here has a stage.json whose parent is its base, by a digest of that one's weights. Of any other
adapter the names and shapes are compared: B A must fit the weights it is added to.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from distill import handover
from distill.atomic import sha256_of
from distill.checks import read_tokenizer
from distill.data.pack import tokenizer_hash
from distill.errors import UserError
from distill.handover import Parent
from distill.weight_files import read_header, stored_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KINDS = {"lora": (False, False), "rslora": (True, False), "dora": (False, True), "qlora": (False, False)}
"""The methods, by PEFT's ``use_rslora`` and ``use_dora``."""

_A = ".lora_A.weight"


def parent_of_tuning(model: Path, key: str = "model") -> Parent:
    """What tuning starts from: a verified stage, or any model's folder by its digest.

    Args:
        key: of the recipe, that names it.

    Raises:
        UserError: no model is there, or a stage's weights are not what it wrote.
    """
    if not (model / "config.json").is_file():
        if (model / CONFIG).is_file():
            what = "give the model it is for, and this as adapter.start" if key == "model" else "give a whole model's"
            raise UserError(f"{key}: {model} holds an adapter; {what}")
        raise UserError(
            f"{key}: {model} is no model's folder (it has no config.json); give a student's, such as the"
            " last stage's of a run"
        )
    if handover.is_there(model):
        return handover.verify(model).as_parent()
    stored_tensors(model)
    return Parent("model", handover.folder_digest(model))


def parent_beside(other: Path, model: Path, tokenizer: Any, key: str) -> Parent:
    """A second model, whose predictions are compared with the tuned one's: over the same tokens.

    Raises:
        UserError: no model is there, or it has another tokenizer or vocabulary.
    """
    parent = parent_of_tuning(other, key)
    theirs, ours = (AutoConfig.from_pretrained(path).get_text_config().vocab_size for path in (other, model))
    if theirs != ours:
        raise UserError(
            f"{key}: {other} predicts {theirs} tokens and {model} {ours}; give a model of the same vocabulary"
        )
    if tokenizer_hash(read_tokenizer(other)) != tokenizer_hash(tokenizer):
        raise UserError(
            f"{key}: {other} has another tokenizer than {model}, so that their predictions are of different tokens;"
            " give a model with the same one"
        )
    return parent


def check_adapter(folder: Path, model: Path, parent: Parent, method: str) -> None:
    """Refuse an adapter that is not for this model or not of this method.

    Raises:
        UserError: also where the folder holds no adapter.
    """
    config = _config(folder)
    if (bool(config.get("use_rslora")), bool(config.get("use_dora"))) != KINDS[method]:
        raise UserError(f"adapter.start: {folder} is of another method than {method}; give the one it was made with")
    tensors = read_header(folder / WEIGHTS)
    if handover.is_there(folder):
        base = handover.verify(folder).parent
        if base != parent:
            was = f"{base.stage} ({base.sha256[:12]})" if base else "another model"
            raise UserError(
                f"adapter.start: {folder} is an adapter for {was}, and {model} is {parent.stage}"
                f" ({parent.sha256[:12]}); give the model it was trained on: {config.get('base_model_name_or_path')}"
            )
    stored = stored_tensors(model)
    for name in (name for name in tensors if name.endswith(_A)):
        module = name.removeprefix("base_model.model.").removesuffix(_A)
        weight = stored.get(f"{module}.weight")
        outer = tensors.get(name.replace("lora_A", "lora_B"))
        fits = weight and outer and {tensors[name].shape[1], outer.shape[0]} == set(weight.shape)
        if not fits:
            has = f"{' × '.join(map(str, weight.shape))} there" if weight else "not there"
            raise UserError(f"adapter.start: {folder} is for another model than {model}: {module} is {has}")


def adapter_digest(folder: Path) -> str:
    """SHA-256 of an adapter: of its weights and of its config, where alone α stands, by which B A is scaled."""
    told = [f"{name} {sha256_of(folder / name)}" for name in (CONFIG, WEIGHTS)]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _config(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / CONFIG).read_text())
        if not (folder / WEIGHTS).is_file():
            raise FileNotFoundError(WEIGHTS)
    except (OSError, ValueError) as error:
        raise UserError(f"adapter.start: {folder} holds no adapter ({error}); needed: {CONFIG} and {WEIGHTS}") from None
    return found
