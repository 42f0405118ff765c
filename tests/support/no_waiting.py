"""A dispatch mode that raises at what would make the host wait for a GPU."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
NAMES = (
    "_local_scalar_dense nonzero nonzero_numpy masked_select is_nonzero equal _unique2 unique_dim unique_consecutive "
    "repeat_interleave bincount argwhere"
)
WAITS = {getattr(aten, name) for name in NAMES.split()}
INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)


class NoWaiting(TorchDispatchMode):
    """A Triton operator is one call here, whatever is inside."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        by_mask = func.overloadpacket in INDEXING and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        assert func.overloadpacket not in WAITS and not by_mask, f"{func} waits for the device"
        if func.overloadpacket == aten._to_copy and kwargs.get("device") is not None:
            assert torch.device(kwargs["device"]) == args[0].device, f"{func} between devices waits for the device"
        return func(*args, **kwargs)
