"""Programs that measure models and tell what became of a run: ``python -m eval.NAME``."""
