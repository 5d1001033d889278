"""How real processes agree: what the main one does, what fails on any of them, and numbers that are added up."""

import os
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from distill.engines import processes
from distill.errors import UserError
from tests.distill.engines.several import several


def test_one_process_needs_none_of_it():
    assert (processes.rank(), processes.world(), processes.is_main()) == (0, 1, True)
    processes.wait()
    assert processes.gather("here") == ["here"]
    assert processes.on_main(lambda: processes.on_main(lambda: 7)) == 7
    assert processes.together(lambda: 7) == 7
    assert torch.equal(processes.gather_numbers(torch.tensor([1.0, 2.0])), torch.tensor([[1.0, 2.0]]))
    with pytest.raises(UserError, match=r"^no$"):
        processes.together(refuse)


def refuse() -> None:
    raise UserError("no")


def said(call) -> str:
    """The message that ``call`` fails with, by every process."""
    with pytest.raises(UserError) as refused:
        call()
    assert refused.value.everyones
    return str(refused.value)


def their_places() -> tuple:
    return processes.rank(), processes.world(), processes.is_main(), processes.gather(f"from {processes.rank()}")


def test_every_process_knows_its_place():
    everyones = [f"from {rank}" for rank in range(3)]
    assert several(3, their_places) == [(rank, 3, rank == 0, everyones) for rank in range(3)]


def done_on_main(folder: Path) -> tuple:
    def once() -> dict:
        (folder / "calls").open("a").write("called\n")
        return {"pid": os.getpid(), "nested": processes.on_main(lambda: processes.on_main(os.getpid))}

    first = processes.on_main(once)
    again = processes.on_main(lambda: processes.rank())  # what is nested left nothing behind
    return first, again, os.getpid()


def test_the_main_process_alone_does_it_and_all_have_the_result(tmp_path):
    (told, again, main), (same, *_, other) = several(2, done_on_main, tmp_path)
    assert told == same == {"pid": main, "nested": main}
    assert again == 0
    assert main != other
    assert (tmp_path / "calls").read_text() == "called\n"


def refused_on_main() -> tuple:
    message = said(lambda: processes.on_main(refuse))
    nested = said(lambda: processes.on_main(lambda: processes.on_main(refuse)))
    return message, nested, processes.on_main(lambda: "and on it goes"), processes.gather(processes.rank())


def test_what_the_main_process_refuses_all_refuse():
    assert several(2, refused_on_main) == [("no", "no", "and on it goes", [0, 1])] * 2


def waits_on_main() -> list[bool]:
    """Waiting for processes that are waiting for this one would be for ever."""

    def refused(call) -> bool:
        try:
            call()
        except AssertionError:
            return True
        return False

    return processes.on_main(lambda: [refused(processes.wait), refused(lambda: processes.gather(1))])


def test_the_main_process_alone_cannot_wait_for_the_others():
    assert several(2, waits_on_main) == [[True, True]] * 2


def done_together(failing: tuple[int, ...]) -> object:
    def work() -> int:
        if processes.rank() in failing:
            raise UserError(f"no room for {processes.rank()}")
        return 10 * processes.rank()

    if not failing:
        return processes.together(work)
    return said(lambda: processes.together(work)), processes.gather(processes.rank())


def test_what_all_do_together_fails_for_all():
    assert several(3, done_together, ()) == [0, 10, 20]
    for failing in ((0,), (1,), (1, 2)):
        messages = several(3, done_together, failing)
        assert messages == [messages[0]] * 3
        assert f"no room for {failing[0]}" in messages[0][0]
    assert "process 1" in messages[0][0]


def gathered_numbers() -> tuple[torch.Tensor, torch.Tensor]:
    """Their sum in fp64 depends on the order."""
    values = torch.tensor([[1.0, 1e-17], [1e16, 3.0], [-1e16, 1e-17]], dtype=torch.float64)[processes.rank()]
    gathered = processes.gather_numbers(values)
    return gathered, gathered.sum(0)


def test_numbers_are_the_same_on_every_process():
    results = several(3, gathered_numbers)
    for gathered, total in results:
        assert gathered.shape == (3, 2)
        assert gathered[1, 0] == 1e16
        assert torch.equal(gathered, results[0][0])
        assert torch.equal(total, results[0][1])


def waited_for(folder: Path) -> bool:
    if processes.rank() == 1:
        time.sleep(0.2)
        (folder / "late").touch()
    processes.wait()
    return (folder / "late").exists()


def test_waiting_ends_when_the_last_has_come(tmp_path):
    assert several(2, waited_for, tmp_path) == [True, True]


def dies() -> None:
    if processes.rank() == 1:
        os._exit(7)
    processes.wait()


def test_a_process_that_dies_ends_the_wait_at_once():
    with pytest.raises(AssertionError, match=r"process 0: .*(?s:.*)process 1: it died"):
        several(2, dies)


def limit_of(group: dist.ProcessGroup) -> timedelta:
    return group._get_backend(torch.device("cpu")).options._timeout


def limits() -> list[timedelta]:
    """Of exchanges, after another round in the same store with another limit; and of waiting."""
    dist.destroy_process_group()
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"
    processes.LIMIT = timedelta(minutes=7)
    processes.start("cpu")
    return [limit_of(dist.group.WORLD), limit_of(processes._waiting_group)]


def test_exchanges_have_a_limit_and_waiting_a_day():
    assert several(1, limits) == [[timedelta(minutes=7), timedelta(days=1)]]


def limit_of_a_library() -> timedelta:
    return limit_of(dist.new_group())  # as DeepSpeed makes its own


def test_groups_that_libraries_make_have_the_same_limit():
    assert several(1, limit_of_a_library) == [processes.LIMIT]
