"""Image-text rows, prepared once: which there are, how long each is and where its answers lie; pixels are read later.

A prepared folder holds, for each split, ``SPLIT.rows`` (a JSON line a row) and ``SPLIT.places`` (int64: where each line
begins), and ``manifest.json``. ``ImageTextRows`` serves rows as ``Blocks`` serves token blocks, so that the order of
training and resuming are the same: one integer.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from distill.atomic import sha256_of, whole_folder
from distill.data.blocks import MANIFEST
from distill.data.image_encoding import Encoded, ImageEncoder, Score
from distill.data.image_rows import ImageRow, find_row_files, read_image_rows
from distill.data.pack import tokenizer_hash
from distill.data.progress import progress, say
from distill.data.splits import HELD_OUT, TRAIN, require_both_sides
from distill.errors import UserError

FORMAT = "image-text 1"


@dataclass(frozen=True)
class ImageManifest:
    """What a prepared folder holds.

    Attributes:
        format: of the folder.
        request: of what was asked for: files as they are listed, processor, settings.
        fingerprint: of all rows and the bytes of all images: it changes when a batch may.
        kind: of the rows.
        rows: of each split.
        tokens: of each split, image placeholders included.
        too_long: rows that were left out.
        without_images: rows that are only text.
        sha256: of the files.
    """

    format: str
    request: str
    fingerprint: str
    kind: Any
    rows: dict[str, int]
    tokens: dict[str, int]
    too_long: int
    without_images: int
    sha256: dict[str, str]


class ImageTextRows:
    """The rows of one split of a prepared folder, as batches for models; compare ``Blocks``.

    Attributes:
        block: the most tokens a row has.
        n_full: rows.
        n_tokens: of all rows.
        n_documents: rows.
        fingerprint: of the rows and images of both splits.
        without_images: rows of both splits that are only text.
    """

    def __init__(self, folder: Path, split: str, block: int, processor: Any, image_token_id: int, score: Score) -> None:
        """Open split ``"train"`` or ``"held_out"``; raises UserError if the folder is not prepared."""
        manifest = read_image_manifest(folder)
        if manifest is None:
            raise UserError(f"{folder}: holds no prepared image-text rows; prepare them first")
        self.block, self.score = block, score
        self.encoder = ImageEncoder(processor, manifest.kind, image_token_id)
        self.n_full = self.n_documents = manifest.rows[split]
        self.n_tokens = manifest.tokens[split]
        self.fingerprint, self.without_images = manifest.fingerprint, manifest.without_images
        self._places = np.fromfile(folder / f"{split}.places", "<i8")
        self._path = folder / f"{split}.rows"

    def __len__(self) -> int:
        return self.n_full

    def row(self, index: int) -> Encoded:
        """Row ``index``, without its pixels."""
        with self._path.open("rb") as file:
            file.seek(self._places[index])
            row = json.loads(file.readline())
        answers = tuple((first, last) for first, last in row["answers"])
        return Encoded(row["text"], row["answer"], tuple(row["images"]), row["n_tokens"], answers)

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Several rows as in ``ImageEncoder.batch``."""
        return self.encoder.batch([self.row(index) for index in indices], self.score)


def prepare_image_text(
    sources: Sequence[str], processor: Any, image_token_id: int, folder: Path, *, block: int, fraction: float
) -> ImageManifest:
    """Read all rows once into ``folder``, or keep what is there when it was made from the same things.

    Args:
        sources: ``.jsonl`` and ``.parquet`` files, folders or globs.
        processor: the teacher's.
        image_token_id: the placeholder of a feature.
        folder: appears whole or not at all.
        block: the most tokens of a row; longer rows are left out, since an image cannot be cut.
        fraction: of the rows held out, by the hash of what they say and of their images' bytes.

    Raises:
        UserError: a row cannot be read, the folder holds something else, or a split has no row.
    """
    files = find_row_files(sources)
    listed = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    settings = [FORMAT, tokenizer_hash(processor.tokenizer), processor.chat_template, _of_processor(processor)]
    request = _digest([settings, listed, block, fraction])
    there = read_image_manifest(folder)
    if there is not None and there.request == request and _is_intact(folder, there):
        return there
    if folder.exists() and any(folder.iterdir()) and not (folder / MANIFEST).exists():
        raise UserError(f"{folder}: holds something other than prepared data; give a new or empty folder")
    rows = read_image_rows(files)
    first = next(rows, None)
    if first is None:
        raise UserError(f"data.source {', '.join(sources)}: holds no row")
    encoder = ImageEncoder(processor, first.kind, image_token_id)
    with whole_folder(folder.resolve()) as partial:
        made = _write(partial, _all(first, rows), encoder, block, fraction, folder)
        manifest = ImageManifest(
            FORMAT, request, _digest([settings, made.digest.hexdigest()]), first.kind, **made.counts()
        )
        (partial / MANIFEST).write_text(json.dumps(asdict(manifest), indent=1))
    return manifest


def read_image_manifest(folder: Path) -> ImageManifest | None:
    """The manifest of a prepared folder; None where there is none, or one of something else."""
    try:
        fields = json.loads((folder / MANIFEST).read_text())
        return ImageManifest(**fields) if fields.get("format") == FORMAT else None
    except (OSError, ValueError, TypeError, AttributeError):
        return None


class _Written:
    """What was written so far, and how much of it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.digest, self.too_long, self.without_images = folder, hashlib.sha256(), 0, 0
        self.files = {split: (folder / f"{split}.rows").open("wb") for split in (TRAIN, HELD_OUT)}
        self.places: dict[str, list[int]] = {split: [] for split in self.files}
        self.tokens = dict.fromkeys(self.files, 0)

    def add(self, split: str, row: Encoded) -> None:
        self.places[split].append(self.files[split].tell())
        self.files[split].write(json.dumps(asdict(row), ensure_ascii=False).encode() + b"\n")
        self.tokens[split] += row.n_tokens
        self.without_images += not row.images

    def counts(self) -> dict[str, Any]:
        rows = {split: len(places) for split, places in self.places.items()}
        names = sorted(path.name for path in self.folder.iterdir())
        sha256 = {name: sha256_of(self.folder / name) for name in names}
        left = {"too_long": self.too_long, "without_images": self.without_images}
        return {"rows": rows, "tokens": self.tokens, **left, "sha256": sha256}


def _write(
    partial: Path, rows: Iterator[ImageRow], encoder: ImageEncoder, block: int, fraction: float, folder: Path
) -> _Written:
    written = _Written(partial)
    with progress(f"preparing {folder}", "rows") as show:
        for number, row in enumerate(rows, start=1):
            encoded = encoder.encode(row)
            told = [asdict(encoded) | {"images": []}, [sha256_of(Path(image)) for image in encoded.images]]
            name = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).digest()
            if encoded.n_tokens > block:
                written.too_long += 1
                continue
            held_out = int.from_bytes(name[:6]) / 2**48 < fraction
            written.add(HELD_OUT if held_out else TRAIN, encoded)
            written.digest.update(name)
            show(number)
    for split, file in written.files.items():
        file.close()
        np.array(written.places[split], "<i8").tofile(partial / f"{split}.places")
    if written.too_long:
        say(f"{written.too_long} of {number} rows have more than {block} tokens (data.block) and are left out")
    if not any(written.places.values()):
        raise UserError(f"every row has more than {block} tokens, images included; raise data.block")
    n_train, n_held_out = (len(written.places[split]) for split in (TRAIN, HELD_OUT))
    require_both_sides(n_train, n_held_out, f"by hash at {fraction}")
    return written


def _all(first: ImageRow, rest: Iterator[ImageRow]) -> Iterator[ImageRow]:
    yield first
    yield from rest


def _is_intact(folder: Path, manifest: ImageManifest) -> bool:
    try:
        return all(sha256_of(folder / name) == sha for name, sha in manifest.sha256.items())
    except OSError:
        return False


def _of_processor(processor: Any) -> Any:
    """What the processor does, as JSON; where it was loaded from has no say."""
    told = json.loads(processor.to_json_string())
    return {key: value for key, value in told.items() if "name_or_path" not in key}


def _digest(told: Any) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()
