"""A watch on every operation, for tensors of a module's dense shape."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class DenseTensorFormedError(AssertionError):
    """A tensor as large as the weight itself came out of an operation."""


class Watch(TorchDispatchMode):
    """Fails on any operation whose result could hold a dense delta."""

    def __init__(self, dense, base=None):
        super().__init__()
        self.dense, self.base = dense, base

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            large = isinstance(tensor, torch.Tensor) and tensor.numel() >= self.dense
            if large and not self.is_base(tensor):
                raise DenseTensorFormedError(f"{func} gave {tuple(tensor.shape)}")
        return result

    def is_base(self, tensor):
        """Whether a tensor is the base weight itself, or a view of it."""
        return self.base is not None and (
            tensor.untyped_storage().data_ptr() == self.base.untyped_storage().data_ptr()
        )
