"""The offline teacher: its top-k predictions with their tail mass, written once and read by stage 3.

``codec`` is a record, ``store`` the files, ``writer`` fills them, ``reader`` hands them to training; ``offline`` says
what all this is for a recipe's run. See docs/offline_teacher.md.
"""

from distill.teacher_cache.codec import LARGEST_K, Codec
from distill.teacher_cache.reader import CachedBatches
from distill.teacher_cache.store import Identity, TeacherCache

__all__ = ["LARGEST_K", "CachedBatches", "Codec", "Identity", "TeacherCache"]
