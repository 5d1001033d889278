"""Reach a model's weights by any way into it, wherever an engine keeps them.

FSDP2 and ZeRO-3 keep a module's weights in pieces and make them whole in hooks around its ``forward``. So whatever
else wants them (a mixing matrix, a decoder without its head, a loss over single layers) has to run where ``forward``
would.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

R = TypeVar("R")


def within(module: Any, call: Callable[..., R], *args: Any, **kwargs: Any) -> R:
    """``call(*args, **kwargs)`` in the place of ``module``'s forward, with all hooks of ``module`` around it.

    Inside ``call`` the module's own ``forward`` is back; use ``module.forward(...)`` there, since ``module(...)``
    would run the hooks a second time. Gradients flow as through any forward.
    """
    return through(module, module, call, *args, **kwargs)


def through(wrapper: Any, module: Any, call: Callable[..., R], *args: Any, **kwargs: Any) -> R:
    """``within(module, ...)``, with ``wrapper`` around it, such as DistributedDataParallel, which calls ``module``."""
    own = module.__dict__.get("forward")

    def put_back() -> None:
        module.__dict__.pop("forward", None)
        if own is not None:
            module.forward = own

    # Never no arguments at all: on CUDA FSDP2 moves them to its device and takes the first of those that came out,
    # which before torch 2.13 fails where there was none.
    bare = not args and not kwargs

    def once(*inner_args: Any, **inner_kwargs: Any) -> R:
        put_back()
        return call() if bare else call(*inner_args, **inner_kwargs)

    module.forward = once
    try:
        return wrapper(None) if bare else wrapper(*args, **kwargs)
    finally:
        put_back()


def opened(module: Any, call: Callable[..., R], *args: Any) -> R:
    """``call(*args)`` while the weights of ``module`` are whole; no hook of it sees what goes in or comes out.

    For results that are no tensors, and for a frozen module beside one that trains, whose hooks would wait for the
    backward pass of a result with gradients.
    """
    results: list[R] = []
    within(module, lambda: results.append(call(*args)))
    return results[0]


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of the whole parameter; of one that ZeRO-3 split up only a stump stands in the model."""
    return getattr(parameter, "ds_shape", parameter.shape)
