"""The largest tensor that a piece of code allocates."""

import torch


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the largest storage among the results of all ops, those inside topd's included."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.nbytes = max(self.nbytes, tensor.untyped_storage().nbytes())
        return result
