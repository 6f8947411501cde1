"""Calibration data as a list of calls of the model, whatever form the user gave it in."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree

from gptq_ao.codes.reinterpret import reinterpret
from gptq_ao.config import Calibration
from gptq_ao.errors import CalibrationError

__all__ = ["Batch", "as_batch", "digest", "read_batches"]


@dataclass(frozen=True)
class Batch:
    """One call of the model: `model(*args, **kwargs)`."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def tensors(self) -> list[torch.Tensor]:
        """All tensors of it, of any shape, in the order of the arguments."""
        return [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, torch.Tensor)]


def digest(batches: Iterable[Batch]) -> str:
    """SHA-256 of all tensors of the batches, their dtypes and shapes: the same data has the same digest."""
    hashed = hashlib.sha256()
    for batch in batches:
        for tensor in batch.tensors():
            values = tensor.detach().cpu().flatten()
            hashed.update(f"{tensor.dtype} {tuple(tensor.shape)};".encode())
            hashed.update(reinterpret(values, torch.uint8).numpy().data)
    return hashed.hexdigest()


def as_batch(value: Any, where: str = "the batch") -> Batch:
    """A tensor or another single object is the first argument, a tuple or list the positional ones, a mapping the
    keyword arguments."""
    if isinstance(value, Batch):
        batch = value
    elif isinstance(value, Mapping):
        batch = Batch((), {str(k): v for k, v in value.items()})
    elif isinstance(value, tuple | list):
        batch = Batch(tuple(value), {})
    else:
        batch = Batch((value,), {})
    tensors = batch.tensors()
    if not tensors:
        raise CalibrationError(
            f"{where} holds no tensor ({type(value).__name__}): give the model's own inputs, "
            "a tensor, a tuple of positional or a dict of keyword arguments"
        )
    empty = [tuple(t.shape) for t in tensors if t.numel() == 0]
    if empty:
        raise CalibrationError(f"{where} is empty: a tensor in it has shape {empty[0]}. Leave such batches out")
    return batch


def read_batches(calibration: Calibration) -> list[Batch]:
    """All batches of `calibration`, read once.

    Raises:
        CalibrationError: there are none, or one holds no tensor or an empty one.
    """
    if calibration is None:
        raise CalibrationError(
            "no calibration data: GPTQ needs typical inputs of the model, gptq_config(calibration=[...]). "
            'For data-free rounding to nearest use method="rtn"'
        )
    source = calibration() if callable(calibration) else calibration
    if isinstance(source, torch.Tensor | Mapping | str) or not isinstance(source, Iterable):
        raise CalibrationError(
            f"calibration is a {type(source).__name__}, not a collection of batches: put it in a list, or see "
            "gptq_ao.data.text_batches for text"
        )
    batches = [as_batch(value, f"calibration batch {i}") for i, value in enumerate(source)]
    if not batches:
        raise CalibrationError("no calibration data: the collection of batches is empty (a generator already read?)")
    return batches
