"""Training batches that bring the teacher's predictions with them."""

from torch import Tensor

from distill.data import TrainingBatches
from distill.teacher_cache.store import TeacherCache


class CachedBatches:
    """What ``TrainingBatches`` gives, with three more entries a batch, made from ``TopK``.

    ``teacher_ids`` (B, T, K) int64, ``teacher_log_probs`` (B, T, K) and ``teacher_log_tail`` (B, T) fp32.
    """

    def __init__(self, batches: TrainingBatches, cache: TeacherCache) -> None:
        self.batches = batches
        self.cache = cache

    def batch(self, step: int) -> dict[str, Tensor]:
        """Batch ``step`` as in ``TrainingBatches.batch``, and the teacher's predictions on it."""
        top = self.cache.read(self.batches.indices(step))
        return {
            **self.batches.batch(step),
            "teacher_ids": top.ids_BTK,
            "teacher_log_probs": top.log_probs_BTK,
            "teacher_log_tail": top.log_tail_BT,
        }
