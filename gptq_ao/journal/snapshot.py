"""The activations that wait between two stages, in files: one for each batch."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["pack_batches", "unpack_batch"]

Values = Mapping[str, Any]


def pack_batches(batches: Iterable[Values]) -> Iterator[tuple[dict[str, Any], dict[str, Tensor]]]:
    """For each batch what has to be said of its values, and the tensors by number, as bytes."""
    before: Values = {}
    for values in batches:
        said: dict[str, Any] = {}
        tensors: dict[str, Tensor] = {}
        for name, value in values.items():
            same = isinstance(value, Tensor) and name in before and _same(value, before[name])
            # Such as a mask, which then waits once.
            said[name] = {"as_before": True} if same else _packed(value, tensors)
        yield said, tensors
        before = values


def _packed(value: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if isinstance(value, tuple | list):
        return {"list": [_packed(each, tensors) for each in value]}
    if not isinstance(value, Tensor):
        return {"number": value}  # a size
    # With the order of its axes, since a kernel may sum in another order if that is another one.
    dense = torch.empty_like(value, device="cpu").copy_(value)
    name = str(len(tensors))
    tensors[name] = dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)
    dtype = str(dense.dtype).removeprefix("torch.")
    return {"tensor": name, "shape": list(dense.shape), "stride": list(dense.stride()), "dtype": dtype}


def unpack_batch(said: Mapping[str, Any], tensors: Mapping[str, Tensor], before: Values) -> dict[str, Any]:
    """The values of a batch.

    Args:
        before: those of the batch before.

    Raises:
        AttributeError, KeyError, RuntimeError, TypeError, ValueError: what is said does not fit the tensors.
    """
    return {name: _value(name, each, tensors, before) for name, each in said.items()}


def _value(name: str, said: Mapping[str, Any], tensors: Mapping[str, Tensor], before: Values) -> Any:
    if "number" in said:
        if type(said["number"]) not in (int, float, bool):
            raise ValueError(f"{name!r} is {said['number']!r}")
        return said["number"]
    if "as_before" in said:
        return before[name]
    if "list" in said:
        return [_value(name, each, tensors, {}) for each in said["list"]]
    dtype = getattr(torch, said["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is of {said['dtype']!r}")
    flat = tensors[said["tensor"]].view(dtype)
    shape = torch.Size(said["shape"])
    # `as_strided` itself checks that nothing lies outside; the elements have to be exactly these.
    if flat.dim() != 1 or flat.numel() != shape.numel():
        raise ValueError(f"{name!r} of shape {tuple(shape)} has {flat.numel()} elements")
    return flat.as_strided(shape, said["stride"])


def _same(a: Tensor, b: Any) -> bool:
    return isinstance(b, Tensor) and a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)
