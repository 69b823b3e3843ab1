"""Calls at which a host waits for its device; a CPU has them too, though nothing waits there."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

# Each reads a tensor's contents on the host, or has a result whose shape depends on them. Not `numpy`:
# it refuses tensors of a device.
WAITS = frozenset(
    {
        torch.Tensor.item,
        torch.Tensor.tolist,
        torch.Tensor.cpu,
        torch.Tensor.__bool__,
        torch.Tensor.__int__,
        torch.Tensor.__float__,
        torch.Tensor.__index__,
        torch.Tensor.__contains__,
        torch.Tensor.nonzero,
        torch.Tensor.masked_select,
        torch.Tensor.unique,
        torch.nonzero,
        torch.masked_select,
        torch.unique,
        torch.unique_consecutive,
        torch.equal,
        torch.allclose,
    }
)


def is_wait(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a torch call makes the host wait on a device that computes on its own."""
    if func in WAITS:
        return True
    if func is torch.Tensor.repeat_interleave or func is torch.repeat_interleave:
        return isinstance(_argument(args, 1), torch.Tensor) and "output_size" not in kwargs
    if func is torch.where:
        return len(args) == 1
    if func is torch.Tensor.__getitem__:
        return any(_is_mask(part) for part in _parts(args[1]))
    if func is torch.Tensor.__setitem__:
        return _copies_a_number(*args)
    if func is torch.Tensor.to:
        target = [*args[1:], *kwargs.values()]
        return any(str(part) == "cpu" for part in target) and not kwargs.get("non_blocking")
    return False


def _argument(args: Sequence[Any], place: int) -> Any:
    return args[place] if len(args) > place else None


def _parts(index: Any) -> Sequence[Any]:
    return index if isinstance(index, tuple) else (index,)


def _copies_a_number(into: torch.Tensor, index: Any, value: Any) -> bool:
    """A number is filled in, but for one element, or elements that a tensor names: there it is copied."""
    parts = _parts(index)
    one = len(parts) == into.dim() and all(isinstance(part, int) for part in parts)
    named = any(isinstance(part, torch.Tensor) for part in parts)
    return not isinstance(value, torch.Tensor) and (one or named)


def _is_mask(index: Any) -> bool:
    """Indexing by a mask has to know how many of its entries are set."""
    return isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)
