"""Running the teacher over the text and keeping what it says."""

import shutil
import sys
import time
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from distill.data import Rows
from distill.errors import UserError
from distill.objectives.topk import TopK, top_k_and_tail
from distill.teacher_cache.store import TeacherCache
from distill.units import duration, size
from distill.vision import model_arguments


def missing_shards(cache: TeacherCache, *, rank: int = 0, world: int = 1) -> list[int]:
    """The shards that are missing or damaged, among those that this one of several processes looks at.

    Damaged ones are named on stderr. Every shard is read whole.
    """
    missing = []
    for shard in cache.shards[rank::world]:
        damage = cache.damage_of(shard)
        if damage and cache.is_there(shard):
            _say(f"{damage}: it is written again")
        if damage:
            missing.append(shard)
    return missing


def require_space(cache: TeacherCache, missing: Sequence[int]) -> None:
    """Better now than after hours.

    Raises:
        UserError: the disk has no room for these shards.
    """
    needed, free = sum(map(cache.bytes_of, missing)), shutil.disk_usage(cache.folder).free
    if needed > free:
        raise UserError(
            f"{cache.folder}: the teacher's logits take {size(needed)} more and {size(free)} are free; free some space,"
            " or lower the stage's tokens or offline_teacher.top_k"
        )


def write_shards(
    cache: TeacherCache,
    missing: Sequence[int],
    blocks: Rows,
    teacher: PreTrainedModel,
    *,
    batch_size: int,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
) -> None:
    """Write these shards; of several processes, each writes every ``world``-th.

    A process that is killed loses the shard it was at. Processes make equally many forward passes, each on its own
    blocks, so the teacher may be in pieces that they gather together (FSDP2, ZeRO-3).

    Args:
        cache: where to write.
        missing: their numbers, ascending, the same on every process.
        blocks: the text.
        teacher: called with ids and positions.
        batch_size: blocks a forward pass.
        device: where the batches go.
        rank: which of the processes this is.
        world: how many there are.

    Raises:
        UserError: the teacher's logits are not finite, or the disk is full.
    """
    started, tokens = time.perf_counter(), 0
    for first in range(0, len(missing), world):
        turn = missing[first : first + world]
        longest = _batches(cache, turn[0], batch_size)  # only the last shard of all has fewer blocks
        mine = _batches(cache, turn[rank], batch_size) if rank < len(turn) else []
        if mine:
            cache.write(turn[rank], (_predict(teacher, blocks, part, device, cache.codec.k) for part in mine))
        for part in longest[len(mine) :]:  # in company: what comes out is nobody's
            _predict(teacher, blocks, part, device, cache.codec.k)
        tokens += sum(len(cache.blocks_of(shard)) for shard in turn) * blocks.block
        if rank == 0:
            seconds, done = time.perf_counter() - started, first + len(turn)
            left = duration(seconds / done * (len(missing) - done))
            _say(f"{cache.folder}: {done} of {len(missing)} shards, {tokens / seconds:,.0f} tokens/s, {left} left")


def _batches(cache: TeacherCache, shard: int, batch_size: int) -> list[list[int]]:
    numbers = cache.blocks_of(shard)
    return [numbers[first : first + batch_size] for first in range(0, len(numbers), batch_size)]


@torch.no_grad()
def _predict(teacher: PreTrainedModel, blocks: Rows, numbers: Sequence[int], device: torch.device, k: int) -> TopK:
    batch = {name: rows.to(device) for name, rows in blocks.batch(numbers).items()}
    output = teacher(**model_arguments(teacher.config, batch), use_cache=False)
    top = top_k_and_tail(output.logits, k)
    if top.log_probs_BTK.isnan().any():
        raise UserError(
            f"the teacher's logits on blocks {', '.join(map(str, numbers))} are not finite; run it in another"
            " precision (teacher.dtype), and see that its weights are whole"
        )
    return TopK(*(x.cpu() for x in top))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
