"""How many bytes of tensors live at once."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors that live at once while it is entered, apart from those that were there before."""

    def __init__(self, before: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.live = {tensor.untyped_storage()._cdata: 0 for tensor in before}
        self.now = self.most = 0

    def __torch_dispatch__(
        self, operation: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = operation(*args, **(kwargs or {}))
        for storage in (tensor.untyped_storage() for tensor in tree_leaves(out) if isinstance(tensor, torch.Tensor)):
            if storage._cdata not in self.live:
                self.live[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata)
        self.most = max(self.most, self.now)
        return out

    def _freed(self, key: int) -> None:
        self.now -= self.live.pop(key)
