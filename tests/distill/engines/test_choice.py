"""Which engine trains, and whose share of a step's sequences is whose."""

import pytest
import torch
from torch.distributed.fsdp import fully_shard

from distill.engines import processes
from distill.engines.choice import data_ranks, make_engine
from distill.engines.ddp import DdpEngine
from distill.engines.fsdp2 import Fsdp2Engine
from distill.engines.launched import Launched
from distill.engines.layers import LayersEngine
from distill.engines.plain import PlainEngine
from tests.distill.engines.several import several
from tests.distill.training.tiny_run import Student, groups_of


def chosen(kind: str, by_layers: bool) -> tuple[type, int, int, int]:
    """The engine, this process's share of the data of how many, and how many should share it."""
    student = Student()
    if kind == "fsdp2":
        fully_shard(student)
    engine = make_engine(
        student,
        groups_of(student),
        Launched(kind),
        torch.device("cpu"),
        layerwise=True,
        by_layers=by_layers,
        accumulate=1,
        clip=None,
    )
    assert getattr(engine, "layerwise", True)
    return type(engine), engine.data_rank, engine.data_ranks, data_ranks(by_layers)


@pytest.mark.parametrize("by_layers", [False, True])
def test_one_process_trains_plainly(by_layers):
    assert chosen("one", by_layers) == (PlainEngine, 0, 1, 1)


@pytest.mark.parametrize(("kind", "engine"), [("ddp", DdpEngine), ("fsdp2", Fsdp2Engine)])
def test_processes_share_the_data(kind, engine):
    assert several(2, chosen, kind, False) == [(engine, 0, 2, 2), (engine, 1, 2, 2)]


def test_processes_that_train_layers_of_their_own_read_the_same():
    assert several(2, chosen, "ddp", True) == [(LayersEngine, 0, 1, 1)] * 2


def engine_of_a_student_that_is_whole() -> str:
    student = Student()
    with pytest.raises(AssertionError, match=r"distill\.engines\.placement"):
        Fsdp2Engine(student, groups_of(student), layerwise=True)
    return f"refused by {processes.rank()}"


def test_fsdp2_wants_a_student_that_was_placed():
    assert several(2, engine_of_a_student_that_is_whole) == ["refused by 0", "refused by 1"]
