"""A process that works while the others wait takes every core, and gives them back."""

from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch

from distill import convert_stage, threads
from distill.engines.launched import Launched
from distill.errors import UserError


@pytest.fixture(autouse=True)
def three_cores(monkeypatch):
    monkeypatch.setattr(threads, "cores", lambda: 3)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_every_core_and_back():
    with suppress(ZeroDivisionError), threads.every_core():
        assert torch.get_num_threads() == 3
        raise ZeroDivisionError
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(("kind", "expected"), [("fsdp2", 3), ("zero3", 3), ("ddp", 2), ("one", 2)])
def test_a_conversion_that_the_main_process_does_alone_takes_every_core(monkeypatch, kind, expected):
    def look(*_of_run: object) -> None:
        raise UserError(f"{torch.get_num_threads()} threads")

    monkeypatch.setattr(convert_stage, "_convert", look)
    uncalibrated = SimpleNamespace(student=SimpleNamespace(calibrate=None))
    run = SimpleNamespace(
        launched=Launched(kind), held_out=lambda: iter(()), teacher=None, recipe=uncalibrated, blocks=(None, None)
    )
    with pytest.raises(UserError, match=f"{expected} threads"):
        convert_stage.convert_stage(run)
    assert torch.get_num_threads() == 2
