"""What one stage hands to the next: a folder that is whole, and a record of what is in it.

    logits/  model.safetensors  config.json  tokenizer…  recipe.yaml  stage.json

stage.json names the stage, the stage it came from, and the SHA-256 of every file the next one loads. That one
verifies them before it loads anything, so what was swapped, cut short or edited is refused by name.
"""

import hashlib
import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from distill.atomic import sha256_of, whole_folder
from distill.errors import UserError

RECORD = "stage.json"
WEIGHTS = ".safetensors"


@dataclass(frozen=True)
class Parent:
    """The stage that another one started from, and the digest of its record."""

    stage: str
    sha256: str


def versions() -> dict[str, str]:
    """The versions that numbers may depend on."""
    packages = ("torch", "transformers", "accelerate", "safetensors")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


@dataclass(frozen=True)
class StageRecord:
    """What stage.json says.

    Attributes:
        stage: "mixing", "hidden", "logits", …
        parent: what the stage started from, the teacher included.
        loss_start: loss of its first step; None where nobody measured it.
        loss_end: loss of its last step.
        steps: optimizer steps.
        tokens: tokens they took.
        seconds: time they took.
        settings: a fingerprint of the part of the recipe that the stage depends on, or "".
        weights: SHA-256 by name of every weight file, their index and config.json; filled in by ``write``.
        sizes: their bytes; filled in by ``write``.
        versions: see ``versions``.
        kept_step: the step whose weights these are, where ``keep_best`` chose another than the last.
    """

    stage: str
    parent: Parent | None
    loss_start: float | None
    loss_end: float | None
    steps: int
    tokens: int
    seconds: float
    settings: str = ""
    weights: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=versions)
    kept_step: int | None = None

    def as_parent(self) -> Parent:
        """How the next stage refers to this one: by a digest over its weights and its own parent."""
        ancestry = asdict(self.parent) if self.parent else None
        # Not config.json, in which every version of transformers writes its own name.
        weights = {name: sha256 for name, sha256 in self.weights.items() if name.endswith(WEIGHTS)}
        told = json.dumps([self.stage, ancestry, weights], sort_keys=True)
        return Parent(self.stage, hashlib.sha256(told.encode()).hexdigest())


def is_there(folder: Path) -> bool:
    """Whether a stage was handed on at ``folder``; ``verify`` tells whether it is still what was written."""
    return (folder / RECORD).is_file()


def require_room(folder: Path) -> None:
    """Make sure that ``write`` may write ``folder``: worth asking before hours of training.

    Raises:
        UserError: ``folder`` holds something that is not a stage.
    """
    if folder.is_file() or (folder.is_dir() and not is_there(folder) and any(folder.iterdir())):
        raise UserError(
            f"{folder} is not empty and holds no {RECORD}, so it is not a finished stage and is not replaced;"
            " move it away, or choose another run_dir"
        )


def write(folder: Path, save: Callable[[Path], None], record: StageRecord) -> StageRecord:
    """Make ``folder`` a stage folder: all of it or nothing.

    Args:
        folder: where it shall stand; an earlier stage folder there is replaced.
        save: writes the Hugging Face folder (``.safetensors`` weights) and the recipe into the path it is given.
        record: ``weights`` and ``sizes`` are filled in here.

    Returns:
        The record as written.

    Raises:
        UserError: ``folder`` holds something that is not a stage, or the disk is full.
    """
    require_room(folder)
    with whole_folder(folder) as partial:
        save(partial)
        assert _weight_files(partial), f"save wrote no {WEIGHTS} file"
        files = [*_weight_files(partial), *partial.glob(f"*{WEIGHTS}.index.json"), *partial.glob("config.json")]
        record = replace(
            record,
            weights={path.name: sha256_of(path) for path in files},
            sizes={path.name: path.stat().st_size for path in files},
        )
        (partial / RECORD).write_text(json.dumps(asdict(record), indent=1) + "\n")
    return record


def verify(folder: Path, expected_parent: Parent | None = None, *, expected_settings: str | None = None) -> StageRecord:
    """Read a stage folder's record, after hashing its weights anew.

    Args:
        folder: as given to ``write``.
        expected_parent: the stage it must have started from; None accepts any.
        expected_settings: the ``settings`` it must have been made with; None accepts any.

    Raises:
        UserError: something is missing, cut short, edited, not in the record, or made from something else.
    """
    record = read(folder)
    for name, sha256 in record.weights.items():
        path = folder / name
        if not path.is_file():
            raise _refusal(path, "is missing")
        if path.stat().st_size != record.sizes[name]:
            raise _refusal(path, f"has {path.stat().st_size:,} bytes instead of {record.sizes[name]:,}")
        if sha256_of(path) != sha256:
            raise _refusal(path, "was changed after the stage wrote it (its SHA-256 differs)")
    for path in _weight_files(folder):
        if path.name not in record.weights:
            raise _refusal(path, f"is not among the weights that {RECORD} lists")
    if expected_parent is not None and record.parent != expected_parent:
        raise _refusal(folder, f"started from {_named(record.parent)}, not from {_named(expected_parent)}")
    if expected_settings is not None and record.settings != expected_settings:
        raise _refusal(folder, "was made with another recipe than this one")
    return record


def read(folder: Path) -> StageRecord:
    """A stage folder's record, without looking at the weights.

    Raises:
        UserError: no folder, no stage.json, or one that is not a record.
    """
    path = folder / RECORD
    if not folder.is_dir():
        raise UserError(f"{folder} is missing: run the stage that writes it first")
    if not path.is_file():
        raise UserError(f"{path} is missing: {folder} is not a finished stage; remove it and run that stage again")
    try:
        return _record(json.loads(path.read_text()))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _refusal(path, f"is damaged ({error})") from error


def folder_digest(folder: Path) -> str:
    """SHA-256 over a model folder's config and weights; over its name where it is not a local folder (a hub id)."""
    files = [path for path in (folder / "config.json", *_weight_files(folder)) if path.is_file()]
    if not files:
        return name_digest(str(folder))
    return _digest([f"{path.name} {sha256_of(path)}" for path in files])


def name_digest(name: str) -> str:
    """What ``folder_digest`` gives for a hub id, which is no folder here: by it a name is known to be one."""
    return _digest([name])


def _digest(told: list[str]) -> str:
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _record(entries: dict[str, Any]) -> StageRecord:
    unknown = entries.keys() - {field.name for field in fields(StageRecord)}
    if unknown:
        raise ValueError(f"unknown entries {', '.join(sorted(unknown))}")
    parent = entries["parent"]
    record = StageRecord(**entries | {"parent": parent and Parent(**parent)})
    if not record.weights or record.weights.keys() != record.sizes.keys():
        raise ValueError("weights and sizes must list the same files, at least one")
    return record


def _weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{WEIGHTS}"))


def _named(parent: Parent | None) -> str:
    return f"{parent.stage} ({parent.sha256[:12]})" if parent else "the teacher"


def _refusal(path: Path, what: str) -> UserError:
    return UserError(f"{path} {what}: run the stage that wrote it again, or restore the file")
