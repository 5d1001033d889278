"""What a student is said to remember, against the bytes that its cache holds."""

import copy
from typing import Any

import pytest
import torch

from distill.cache import cache_nbytes
from distill.conversion import Report, convert_with_report, empty_model
from distill.export.footprint import Footprint, footprint_of
from distill.mixers import KINDS
from distill.student import mixers_of, state_bytes
from distill.window import Window
from distill.windowed import matching_window
from tests.conftest import tiny

WINDOW, SINKS = 8, 2
DTYPES = (torch.float32, torch.bfloat16)


def converted(dtype: torch.dtype, **choices: Any) -> tuple[Any, Report]:
    behind = "sliding_window" in choices.values() or "window_layers" in choices
    sizes = {"window": WINDOW, "sinks": SINKS} if behind else {}
    return convert_with_report(tiny("llama").to(dtype), **sizes, **choices)


def footprint(student: Any) -> Footprint:
    """By the config of the student's folder, which alone says the dtype."""
    config = copy.deepcopy(student.config)
    config.dtype = student.dtype
    return footprint_of(config)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mixer", sorted(KINDS))
def test_the_bytes_of_a_state_are_those_in_the_cache(mixer, dtype):
    """States are fp32 whatever the model is; a convolution's inputs, keys and values are in the model's dtype."""
    student, told = converted(dtype, mixer=mixer)
    cache = student(torch.arange(3, 43)[None], use_cache=True).past_key_values
    assert told.state_bytes == state_bytes(student) == cache_nbytes(cache)
    assert footprint(student).student_bytes(40) == cache_nbytes(cache)
    assert state_bytes(empty_model(student.config), dtype) == cache_nbytes(cache)
    one = mixers_of(student)[0]
    assert 3 * one.state_bytes(dtype) == cache_nbytes(cache)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_window_of_equal_bytes_is_the_student_s_own(dtype):
    student, _ = converted(dtype, mixer="sliding_window")
    assert matching_window(tiny("llama").to(dtype), student, sinks=SINKS) == Window((0, 1, 2), WINDOW, SINKS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("beside", [{"window_layers": [1]}, {"keep_heads": {1: [0]}}, {"keep_attention": [1]}], ids=str)
def test_what_stands_beside_mixers_is_counted_in_the_model_s_dtype(beside, dtype):
    student, told = converted(dtype, **beside)
    cache = student(torch.arange(3, 43)[None], use_cache=True).past_key_values
    assert told.cache_bytes(40)[0] == footprint(student).student_bytes(40) == cache_nbytes(cache)
