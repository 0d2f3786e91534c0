"""The tensors that a piece of code makes, those inside topd's ops included."""

from collections.abc import Callable

import torch
from torch import Tensor


class Watch(torch.utils._python_dispatch.TorchDispatchMode):
    """Calls `see` on the results of all ops. A mode is off while an op runs that it was told of: topd's own run under it."""

    def __init__(self, see: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.see = see

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "topd" and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), EXPLICIT):
            with self:
                result = func._op_dk(EXPLICIT, *args, **(kwargs or {}))
        else:
            result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.see(tensor)
        return result


EXPLICIT = torch._C.DispatchKey.CompositeExplicitAutograd


class Largest(Watch):
    """Notes the largest storage."""

    nbytes = 0

    def __init__(self) -> None:
        super().__init__(self._note)

    def _note(self, tensor: Tensor) -> None:
        self.nbytes = max(self.nbytes, tensor.untyped_storage().nbytes())
