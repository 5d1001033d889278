"""Calibrated seeding: what the copied weights leave of the gap to attention is closed in closed form, on some text.

    memories   how far each head looks back: the decay whose matrix lies nearest to attention's       (memories.py)
    outputs    the output projection: ridge regression onto what attention adds to the stream         (outputs.py)
    layers     which states both read: the teacher's, or the student's own, layer after layer         (layers.py)

No gradient is computed and nothing else of the student changes.
"""

from distill.fitting.layers import Calibrated, calibrate_student

__all__ = ["Calibrated", "calibrate_student"]
