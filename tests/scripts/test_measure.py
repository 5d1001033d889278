"""The rulers of the benchmarks, on calls whose size and order are known."""

import json
import math
import time
from collections.abc import Callable

import pytest
import torch

from scripts import measure

MIB = 2**20


def two_tensors_at_once(n_bytes: int) -> Callable[[], object]:
    x = torch.ones(n_bytes // 4)

    def call() -> None:
        for _ in range(3):  # not one after the other
            y = x + 1
            y = y + 1  # the old one lives until the new one is there
            del y

    return call


def test_peak_memory_is_what_the_call_adds():
    got = measure.peak_memory(two_tensors_at_once, 100 * MIB, threads=1)
    assert 200 * MIB <= got <= 216 * MIB


def test_contenders_take_turns_and_warm_up_uncounted(monkeypatch):
    ticks = iter(range(1000))
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks) ** 2)  # every call takes longer than the one before
    called: list[str] = []
    got = measure.seconds({name: lambda name=name: called.append(name) for name in "ab"}, repeats=3, warmup=2)
    assert called == ["a", "b"] * 5
    # Call i takes (2i + 1)² − (2i)² = 4i + 1; of a these are the calls 4, 6, 8 and of b 5, 7, 9.
    assert got == {"a": 25, "b": 29}


def test_a_record_says_where_it_was_made(tmp_path):
    path = tmp_path / "new" / "figures.json"
    measure.record(path, {"rows": [1, 2]})
    got = json.loads(path.read_text())
    assert got["rows"] == [1, 2]
    assert got["measured_on"]["versions"]["torch"] == torch.__version__
    assert {"date", "machine", "threads", "cores"} <= got["measured_on"].keys()


def test_a_record_is_json_whatever_the_numbers(tmp_path):
    measure.record(tmp_path / "figures.json", {"loss": math.nan, "name": "é"})
    told = (tmp_path / "figures.json").read_text()
    assert json.loads(told, parse_constant=pytest.fail)["loss"] == "nan"
    assert "é" in told


def test_the_environment_is_put_back(monkeypatch):
    monkeypatch.setenv("KNOWN", "before")
    monkeypatch.delenv("UNKNOWN", raising=False)
    with measure._environment(KNOWN="inside", UNKNOWN="inside"):
        assert measure.os.environ["UNKNOWN"] == measure.os.environ["KNOWN"] == "inside"
    assert measure.os.environ["KNOWN"] == "before"
    assert "UNKNOWN" not in measure.os.environ
