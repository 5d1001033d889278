"""No T×T tensor is made by streamed_mixing_distance, forward or backward, and what it takes grows with T."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distill.objectives import streamed_mixing_distance, strips
from tests.distill.objectives.matrix_pairs import cast, distance_written_out, given, random_pair

HEADS = 2


class Allocated(TorchDispatchMode):
    """Elements of the largest tensor made while it is entered, and bytes of all that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.largest = self.most = 0

    def __torch_dispatch__(
        self, operation: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = operation(*args, **(kwargs or {}))
        for tensor in (x for x in tree_leaves(out) if isinstance(x, torch.Tensor)):
            storage = tensor.untyped_storage()
            if storage._cdata not in before and storage._cdata not in self.live:
                self.live[storage._cdata] = storage.nbytes()
                self.largest = max(self.largest, storage.nbytes() // tensor.itemsize)
                weakref.finalize(storage, self.live.pop, storage._cdata, None)
        self.most = max(self.most, sum(self.live.values()))
        return out


def allocated(distance: Callable[..., torch.Tensor], length: int, **settings: Any) -> Allocated:
    exact, q, k = random_pair(length, batch=1, heads=HEADS, keys=HEADS, width=16, state=16, decay=0.01)
    factors = cast(exact, torch.float32)
    with Allocated() as seen:
        distance(factors, q.float(), k.float(), scaling=0.25, **settings).backward()
    assert all(factor.grad is not None for factor in given(factors))
    return seen


@pytest.mark.parametrize("form", ["unsquared", "row_normalised"])
@pytest.mark.parametrize("more", [{}, {"window": 100}, {"document_BT": torch.arange(2048)[None] // 700}])
def test_no_tensor_has_the_elements_of_a_matrix(form, more):
    length = 2048
    seen = allocated(streamed_mixing_distance, length, form=form, **more)
    assert seen.largest < length**2 / 2  # of one head alone; the room for two strips is the largest
    assert allocated(distance_written_out, length, form=form, **more).largest == HEADS * length**2


def test_memory_grows_with_the_length_and_not_its_square(monkeypatch):
    monkeypatch.setattr(strips, "_STRIP_BYTES", {"cpu": 1})  # head by head, as with lengths beyond a machine's cache
    short, middle, long = (allocated(streamed_mixing_distance, length).most for length in (512, 1024, 2048))
    assert middle / short < 2.05
    assert long / middle < 2.05
