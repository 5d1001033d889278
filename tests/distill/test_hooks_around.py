"""What runs in the place of a module's forward, with its hooks around it."""

import pytest
import torch
from torch import nn
from torch.distributed.utils import _to_kwargs

from distill.within import opened, within


@pytest.fixture
def seen():
    """A linear layer, and what its pre-hook saw of every call."""
    calls: list[tuple] = []
    module = nn.Linear(2, 2)
    module.register_forward_pre_hook(lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    return module, calls


def test_arguments_pass_through_the_hooks(seen):
    module, calls = seen
    assert within(module, lambda a, b: a + b, 1, b=2) == 3
    assert calls == [((1,), {"b": 2})]


def test_hooks_see_an_argument_even_where_there_is_none(seen):
    """On CUDA, FSDP2 moves the arguments and takes the first; torch 2.11 does not find one in nothing."""
    module, calls = seen
    assert opened(module, lambda: torch.ones(())) == 1
    assert within(module, lambda: module.weight) is module.weight
    for args, kwargs in calls:
        moved, named = _to_kwargs(args, kwargs, torch.device("cpu"), False)
        assert (moved[0], named[0]) == ((None,), {})


def test_the_module_is_itself_again_also_after_an_error(seen):
    module, _ = seen
    with pytest.raises(ZeroDivisionError):
        within(module, lambda: 1 / 0)
    assert "forward" not in module.__dict__
    assert module(torch.ones(1, 2)).shape == (1, 2)
