"""Distil pretrained Transformers into Mamba-2 models and Mamba-2/attention hybrids.

Importing this package registers the student classes with transformers, so that
``AutoModelForCausalLM.from_pretrained`` loads a student's folder like any other.
"""

from distill.conversion import convert
from distill.errors import UserError
from distill.student import load_student

__all__ = ["UserError", "convert", "load_student"]
