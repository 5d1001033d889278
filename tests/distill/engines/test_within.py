"""Any call in the place of a module's forward, with the module's hooks around it, once."""

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.utils import _to_kwargs

from distill.within import opened, through, whole_shape, within


class Mixer(nn.Linear):
    """Has a way into its weights besides forward, which counts how often it is called."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)

    def matrix(self, x: Tensor, *, power: int = 1) -> Tensor:
        return (x @ self.weight) ** power


@pytest.fixture
def mixer() -> Mixer:
    torch.manual_seed(0)
    return Mixer(3, 3)


@pytest.fixture
def hooked(mixer) -> list[str]:
    """What fired on the mixer, in order."""
    fired: list[str] = []
    mixer.register_forward_pre_hook(lambda *_: fired.append("before"))
    mixer.register_forward_hook(lambda *_: fired.append("after"))
    mixer.register_full_backward_hook(lambda *_: fired.append("backward"))
    return fired


X = torch.arange(6.0).view(2, 3)


def test_the_call_gets_its_arguments_and_gives_its_result(mixer, hooked):
    assert torch.equal(within(mixer, mixer.matrix, X, power=2), (X @ mixer.weight) ** 2)
    assert hooked == ["before", "after"]
    assert mixer.calls == 0
    assert within(nn.Identity(), lambda: {"any": "thing"}) == {"any": "thing"}


def test_hooks_see_an_argument_even_where_there_is_none(mixer):
    """On CUDA, FSDP2 moves the arguments and takes the first; torch 2.11 does not find one in nothing."""
    calls: list[tuple] = []
    mixer.register_forward_pre_hook(lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    assert opened(mixer, lambda: torch.ones(())) == 1
    assert within(mixer, lambda: mixer.weight) is mixer.weight
    assert within(mixer, lambda a, b: a + b, 1, b=2) == 3
    *bare, given = calls
    assert given == ((1,), {"b": 2})
    for args, kwargs in bare:
        moved, named = _to_kwargs(args, kwargs, torch.device("cpu"), False)
        assert (moved[0], named[0]) == ((None,), {})


def test_forward_is_back_afterwards(mixer, hooked):
    within(mixer, mixer.matrix, X)
    assert "forward" not in vars(mixer)
    hooked.clear()
    assert torch.equal(mixer(X), nn.functional.linear(X, mixer.weight, mixer.bias))
    assert (mixer.calls, hooked) == (1, ["before", "after"])


def test_inside_the_own_forward_is_there_and_fires_no_hook(mixer, hooked):
    got = within(mixer, lambda: mixer.forward(X))
    assert torch.equal(got, nn.functional.linear(X, mixer.weight, mixer.bias))
    assert (mixer.calls, hooked) == (1, ["before", "after"])


def test_gradients_flow_as_through_forward(mixer, hooked):
    x = X.clone().requires_grad_()
    within(mixer, mixer.matrix, x).sum().backward()
    assert torch.equal(mixer.weight.grad, X.sum(0)[:, None].expand(3, 3))
    assert torch.equal(x.grad, mixer.weight.sum(1).expand(2, 3))
    assert mixer.bias.grad is None
    assert hooked == ["before", "after", "backward"]


def test_hooks_may_change_what_goes_in_and_out(mixer):
    mixer.register_forward_pre_hook(lambda _, args: (args[0] + 1,))
    mixer.register_forward_hook(lambda _, __, output: -output)
    assert torch.equal(within(mixer, mixer.matrix, X), -((X + 1) @ mixer.weight))


def fail(*_: object) -> None:
    raise RuntimeError("no")


def test_forward_is_back_after_an_exception(mixer):
    with pytest.raises(RuntimeError, match="no"):
        within(mixer, fail, X)
    assert "forward" not in vars(mixer)
    mixer(X)
    assert mixer.calls == 1


def test_forward_is_back_when_a_hook_fails_before_the_call(mixer):
    handle = mixer.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no"):
        within(mixer, mixer.matrix, X)
    handle.remove()
    assert "forward" not in vars(mixer)
    mixer(X)
    assert mixer.calls == 1


@pytest.mark.parametrize("call", [lambda x: x, fail], ids=["a call", "an exception"])
def test_a_forward_that_was_replaced_on_the_instance_is_back(mixer, call):
    """As accelerate does for mixed precision, and offloading."""
    replaced = lambda x: x * 5  # noqa: E731
    mixer.forward = replaced
    seen = []

    def look(x: Tensor) -> Tensor:
        seen.append(mixer.forward)
        return call(x)

    if call is fail:
        with pytest.raises(RuntimeError, match="no"):
            within(mixer, look, X)
    else:
        within(mixer, look, X)
    assert seen == [replaced]
    assert mixer.forward is replaced
    assert torch.equal(mixer(X), X * 5)


def test_one_within_another(mixer, hooked):
    got = within(mixer, lambda: within(mixer, mixer.matrix, X) + mixer.forward(X))
    assert torch.equal(got, X @ mixer.weight + nn.functional.linear(X, mixer.weight, mixer.bias))
    assert hooked == ["before", "before", "after", "after"]
    assert "forward" not in vars(mixer)


class Wrapper(nn.Module):
    """Calls what it holds, as DistributedDataParallel does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Tensor) -> Tensor:
        return 10 * self.module(*args)


def test_a_wrapper_stands_around_the_module(mixer, hooked):
    wrapper = Wrapper(mixer)
    wrapper.register_forward_pre_hook(lambda *_: hooked.append("wrapper"))
    assert torch.equal(through(wrapper, mixer, mixer.matrix, X), 10 * (X @ mixer.weight))
    assert hooked == ["wrapper", "before", "after"]
    assert "forward" not in vars(mixer)
    assert torch.equal(wrapper(X), 10 * mixer(X))


def test_the_whole_shape_of_a_weight_that_is_split_up(mixer):
    assert whole_shape(mixer.weight) == (3, 3)
    mixer.weight.ds_shape = torch.Size([30, 3])
    assert whole_shape(mixer.weight) == (30, 3)
