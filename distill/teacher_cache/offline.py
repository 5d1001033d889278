"""The teacher cache of a recipe's run: which blocks its logits stage reads, and who writes what is missing."""

from itertools import chain

import numpy as np

from distill.data import micro_batches
from distill.engines import processes
from distill.errors import UserError
from distill.recipe import LogitsStage, OfflineTeacher
from distill.run import Run
from distill.teacher_cache.store import Identity, TeacherCache
from distill.teacher_cache.writer import missing_shards, require_space, write_shards

SHARD_TOKENS = 2**18
"""About 50 MiB at k = 64: what a process that is killed may lose."""


def teacher_cache(run: Run) -> TeacherCache:
    """The cache that the recipe's logits stage reads, whether it is there or not; loads the text, not the teacher.

    Raises:
        UserError: the recipe has no logits stage, or one that runs its teacher.
    """
    stage, offline = _settings(run)
    teacher = processes.on_main(lambda: run.origin)  # a digest of all its weights: once is enough
    batches, block = run.training_batches("logits", 1), run.recipe.block_of(stage)
    # Each block once, in the order of the first epoch. However many processes share the work, none reads beyond these.
    n_blocks = min(stage.tokens // block, batches.n)
    identity = Identity(
        teacher=teacher.sha256,
        teacher_dtype=run.recipe.teacher.dtype,
        text=batches.blocks.fingerprint,
        block=block,
        order=batches.seed,
        vocabulary=run.facts.vocab_size,
        top_k=offline.top_k,
        shard_blocks=max(1, SHARD_TOKENS // block),
    )
    return TeacherCache(run.folder(teacher.stage) / "logits", identity, np.array(batches.first(n_blocks)))


def complete_teacher_cache(run: Run) -> TeacherCache:
    """The same, with every shard in place: what is missing or damaged is written by the processes of the run together.

    Raises:
        UserError: as ``teacher_cache``; or its folder holds another cache, the disk is too small, or the teacher's
            logits are not finite.
    """
    cache, rank, world = teacher_cache(run), processes.rank(), processes.world()
    processes.on_main(cache.claim)
    missing = sorted(chain.from_iterable(processes.gather(missing_shards(cache, rank=rank, world=world))))
    if missing:
        processes.on_main(lambda: require_space(cache, missing))
        stage, _ = _settings(run)
        batch_size, _ = micro_batches(stage.batch_size, stage.micro_batch_size, world)
        teacher, blocks = run.teacher, run.training_batches("logits", 1).blocks
        write_shards(cache, missing, blocks, teacher, batch_size=batch_size, device=run.device, rank=rank, world=world)
    processes.wait()
    return cache


def _settings(run: Run) -> tuple[LogitsStage, OfflineTeacher]:
    stage = run.recipe.stages.logits
    if stage is None or stage.offline_teacher is None:
        raise UserError(
            "the recipe's logits stage reads no teacher from disk; give it offline_teacher: {top_k: 64}, here with"
            " stages.logits.offline_teacher.top_k=64"
        )
    return stage, stage.offline_teacher
