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
    keyword arguments, see `_keywords`."""
    if isinstance(value, Batch):
        batch = value
    elif isinstance(value, Mapping):
        batch = Batch((), _keywords({str(k): v for k, v in value.items()}, where))
    elif isinstance(value, tuple | list):
        batch = Batch(tuple(value), {})
    else:
        batch = Batch((value,), {})
    tensors = batch.tensors()
    if not tensors:
        raise CalibrationError(
            f"{where} holds no tensor ({type(value).__name__}): give the model's own inputs, "
            "a tensor, a tuple of positional or a dict of keyword arguments (for text, see gptq_ao.data.text_batches)"
        )
    empty = [tuple(t.shape) for t in tensors if t.numel() == 0]
    if empty:
        raise CalibrationError(f"{where} is empty: a tensor in it has shape {empty[0]}. Leave such batches out")
    return batch


def _keywords(inputs: dict[str, Any], where: str) -> dict[str, Any]:
    """What tokenizers and tokenized data sets give, as a model takes it: where there are `input_ids`, numbers become
    tensors; and if these ids are those of a single row, without a batch dimension, every tensor gets one."""
    if "input_ids" not in inputs:
        return inputs
    inputs = {name: _as_tensor(name, value, where) for name, value in inputs.items()}
    ids = inputs["input_ids"]
    if not isinstance(ids, torch.Tensor) or ids.dim() != 1:
        return inputs
    return {name: value.unsqueeze(0) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


def _as_tensor(name: str, value: Any, where: str) -> Any:
    """Lists of numbers and NumPy's arrays as tensors, all else as it is."""
    if not isinstance(value, list):
        return torch.as_tensor(value) if hasattr(value, "__array__") else value
    leaves = pytree.tree_leaves(value)
    if leaves and all(type(leaf) in (int, float, bool) for leaf in leaves):
        try:
            return torch.tensor(value)
        except ValueError as e:
            raise CalibrationError(
                f"{where}: {name!r} has rows of different lengths: give each as a batch of its own, or pad them and "
                "give an attention_mask"
            ) from e
    if name == "input_ids":
        # What a DataLoader makes of lists: one tensor for each position.
        raise CalibrationError(
            f"{where}: 'input_ids' is a list of {type(leaves[0]).__name__ if leaves else 'nothing'}, not a tensor "
            '[batch, length] (a DataLoader makes them of dataset.with_format("torch"))'
        )
    return value


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
