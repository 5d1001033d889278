"""A teacher's predictions on disk, in shards that are there whole or not at all.

    teacher/logits/  cache.json  shard-00000.topk  shard-00001.topk …

cache.json says what the predictions depend on: teacher, text, order, format. A shard holds a fixed number of blocks, in
the order in which training first reads them:

    block × record …   one record for each position of each block (``codec``)
    float64            the teacher's probability inside the top k, summed over these positions
    32 bytes           SHA-256 of cache.json's content, the shard's number, and all that stands before

so a shard that was cut short, edited, renamed, or made by another teacher is recognised by itself.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distill.atomic import replace_file
from distill.errors import UserError
from distill.objectives.topk import TopK
from distill.teacher_cache.codec import Codec

MANIFEST = "cache.json"
FORMAT = 1
_COVERED = np.dtype("<f8")
_SHA256 = 32


@dataclass(frozen=True)
class Identity:
    """All that the predictions depend on.

    Attributes:
        teacher: digest of its config and weights.
        teacher_dtype: the precision it ran in.
        text: fingerprint of the documents, the tokenizer and the options.
        block: tokens a block.
        order: seed of the order of the blocks.
        vocabulary: the number of logits.
        top_k: tokens kept at each position.
        shard_blocks: blocks a shard.
    """

    teacher: str
    teacher_dtype: str
    text: str
    block: int
    order: int
    vocabulary: int
    top_k: int
    shard_blocks: int
    format: int = FORMAT

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)


@dataclass(frozen=True, eq=False)
class TeacherCache:
    """The folder of one teacher's predictions on one text.

    Attributes:
        folder: where it stands.
        identity: what it must be made from.
        order: the blocks that training reads, each once, in the order of their first use.
    """

    folder: Path
    identity: Identity
    order: NDArray[np.int64]

    @cached_property
    def codec(self) -> Codec:
        return Codec(self.identity.vocabulary, self.identity.top_k)

    @property
    def shards(self) -> range:
        return range(-(-len(self.order) // self.identity.shard_blocks))

    @property
    def tokens(self) -> int:
        """Positions that it holds when it is complete."""
        return len(self.order) * self.identity.block

    @property
    def n_bytes(self) -> int:
        """What it takes on disk when it is complete."""
        return sum(map(self.bytes_of, self.shards))

    def covered(self) -> float:
        """The share of the teacher's probability that its top k hold, a mean over all positions."""
        sums = [np.fromfile(self._path(shard), _COVERED, 1, offset=self._records_end(shard)) for shard in self.shards]
        positions = sum(self._records_end(shard) for shard in self.shards) / self.codec.record.itemsize
        return float(np.sum(sums) / positions)

    def claim(self) -> None:
        """Make the folder this cache's, or go on with it; of several processes, one calls it before all others go on.

        Raises:
            UserError: the folder belongs to another teacher, text or format.
        """
        path = self.folder / MANIFEST
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_file(path, f"{self.identity.to_json()}\n".encode())
        then, now = _read(path), asdict(self.identity)
        changed = [f"{key}: {then.get(key)} → {value}" for key, value in now.items() if then.get(key) != value]
        if changed:
            raise UserError(
                f"{self.folder} holds a teacher's logits that are not this recipe's ({'; '.join(changed)}); put"
                " that back, choose another run_dir, or remove the folder to write them anew"
            )

    def blocks_of(self, shard: int) -> list[int]:
        first = shard * self.identity.shard_blocks
        return self.order[first : first + self.identity.shard_blocks].tolist()

    def bytes_of(self, shard: int) -> int:
        """What a shard takes on disk."""
        return len(self.blocks_of(shard)) * self._block_bytes + _COVERED.itemsize + _SHA256

    def is_there(self, shard: int) -> bool:
        return self._path(shard).exists()

    def damage_of(self, shard: int) -> str | None:
        """What is wrong with a shard, beginning with its path; None if it is intact. Reads all of it."""
        path = self._path(shard)
        if not path.exists():
            return f"{path} is missing"
        content = memoryview(path.read_bytes())
        # More blocks than are needed are no damage: an earlier recipe asked for more tokens.
        if len(content) < self.bytes_of(shard):
            return f"{path} has {len(content):,} bytes instead of {self.bytes_of(shard):,}"
        if content[-_SHA256:] != self._sha256(shard, content[:-_SHA256]):
            return f"{path} is not what was written (its SHA-256 differs)"
        return None

    def write(self, shard: int, predictions: Iterable[TopK]) -> None:
        """Put a shard in its place, whole.

        Args:
            shard: its number.
            predictions: those for its blocks, a batch of them at a time.

        Raises:
            UserError: the disk is full; other shards are untouched.
        """
        content, covered = bytearray(), 0.0
        for top in predictions:
            content += self.codec.encode(top).tobytes()
            covered += float(top.log_probs_BTK.double().exp().sum())
        content += np.array(covered, _COVERED).tobytes()
        content += self._sha256(shard, content)
        assert len(content) == self.bytes_of(shard)
        replace_file(self._path(shard), bytes(content))

    def read(self, blocks: Sequence[int]) -> TopK:
        """The predictions for these blocks, in this order.

        Raises:
            UserError: a shard has disappeared or was cut short.
        """
        return self.codec.decode(np.stack([self._records(block) for block in blocks]))

    def _records(self, block: int) -> NDArray[np.void]:
        place = self._places[block] if block < len(self._places) else -1
        assert place >= 0, f"block {block} is none that this cache was made for"
        shard, row = divmod(int(place), self.identity.shard_blocks)
        path, count = self._path(shard), self.identity.block
        try:
            records = np.fromfile(path, self.codec.record, count, offset=row * self._block_bytes)
        except FileNotFoundError:
            records = np.empty(0)
        if len(records) < count:
            raise UserError(f"{path} is missing or was cut short; run the same command again, which writes it anew")
        return records

    @cached_property
    def _places(self) -> NDArray[np.int64]:
        """Where in ``order`` each block stands; -1 for one that is not there."""
        places = np.full(self.order.max() + 1, -1)
        places[self.order] = np.arange(len(self.order))
        return places

    @property
    def _block_bytes(self) -> int:
        return self.identity.block * self.codec.record.itemsize

    def _records_end(self, shard: int) -> int:
        return self._path(shard).stat().st_size - _COVERED.itemsize - _SHA256

    def _path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.topk"

    def _sha256(self, shard: int, content: bytearray | memoryview) -> bytes:
        told = hashlib.sha256(f"{self.identity.to_json()}\n{shard}\n".encode())
        told.update(content)
        return told.digest()


def _read(path: Path) -> dict[str, object]:
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError):
        return {}
