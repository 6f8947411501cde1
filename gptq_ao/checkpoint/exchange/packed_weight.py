"""A quantized weight that lies in a checkpoint of another format, and is read when it is asked for."""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from gptq_ao.checkpoint.exchange.grouped_weight import GroupedWeight
from gptq_ao.checkpoint.files.shards import StoredTensor
from gptq_ao.errors import CheckpointError, ConfigError, NonFiniteError, RoundedScalesWarning
from gptq_ao.tensor import GroupTensor, tensor_class

__all__ = ["DenseWeight", "PackedWeight", "Rounding", "held", "warn_moved"]


def warn_moved(path: Path, format: str, moved: Mapping[str, float]) -> None:
    """A RoundedScalesWarning, if offsets were rounded when a file was written.

    Args:
        moved: weight → the largest distance between an offset and what it should be, in steps of its group.
    """
    if moved:
        worst = max(moved, key=moved.__getitem__)
        warnings.warn(
            f"{path}: {len(moved)} weights are asymmetric, and {format} has zero_point·scale of a group in the dtype "
            "of its scales. It was rounded to the nearest, which moves the weights of a group alike, by at most "
            f"{moved[worst]:.1e} of the distance of two codes, in {worst!r}",
            RoundedScalesWarning,
            stacklevel=5,
        )


@dataclass
class Rounding:
    """Collects, over a checkpoint, which weights have scales that had to be rounded to fp16, and which offsets that had
    to be rounded to whole steps."""

    changes: dict[str, float] = field(default_factory=dict)
    moves: dict[str, float] = field(default_factory=dict)

    def warn(self) -> None:
        """One RoundedScalesWarning for all of each kind, if there are any; the next call starts anew."""
        if self.changes:
            worst = max(self.changes, key=self.changes.__getitem__)
            warnings.warn(
                f"{len(self.changes)} weights of the checkpoint have scales that are not fp16 numbers. They were "
                f"rounded to the nearest; the largest change of one is {self.changes[worst]:.1e} of itself, in "
                f"{worst!r}",
                RoundedScalesWarning,
                stacklevel=3,
            )
        if self.moves:
            worst = max(self.moves, key=self.moves.__getitem__)
            warnings.warn(
                f"{len(self.moves)} weights of the checkpoint have offsets that are no whole numbers of steps, as zero "
                "points are. They were rounded to the nearest, which moves the weights of a group alike, by at most "
                f"{self.moves[worst]:.1e} of the distance of two codes, in {worst!r}",
                RoundedScalesWarning,
                stacklevel=3,
            )
        self.changes.clear()
        self.moves.clear()


@dataclass(frozen=True)
class PackedWeight:
    """A quantized weight in files, which is read like any other tensor (`StoredTensor`).

    Attributes:
        name: that of the weight in the checkpoint, such as `model.layers.0.mlp.up_proj.weight`.
        bits: width of its codes in the file.
        group_size: input features of a group in the file; the last one may have fewer.
        shape: [N, K].
        dtype: that of the weight it stands for.
        parts: last part of a tensor's name → where that tensor lies.
        decode: function from those tensors to the weight.
        rounding: record of the checkpoint, for the case that numbers have to be rounded.
        values: function from those tensors to the dense weight, of a format that says more than a quantized weight
            holds; None: what that stands for.
    """

    name: str
    bits: int
    group_size: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: Mapping[str, StoredTensor]
    decode: Callable[[Mapping[str, Tensor]], GroupedWeight]
    rounding: Rounding
    values: Callable[[Mapping[str, Tensor]], Tensor] | None = None

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())

    def read(self, device: torch.device | str = "cpu") -> GroupTensor:
        """The weight [N, K] on `device`, where it is also decoded.

        Raises:
            CheckpointError: the tensors do not make a weight.
        """
        try:
            # Decoded on the device: packed tensors are the least to move.
            weight = self.decode({part: stored.read(device) for part, stored in self.parts.items()})
            # Collected, so that a checkpoint gives one warning and not one for each weight.
            if weight.rounded:
                self.rounding.changes[self.name] = weight.rounded
            if weight.moved:
                self.rounding.moves[self.name] = weight.moved
            return held(weight, self.dtype)
        except (CheckpointError, ConfigError, NonFiniteError) as e:
            file = next(iter(self.parts.values())).path
            raise CheckpointError(f"{file}: weight {self.name!r} is damaged: {e}") from e

    def read_dense(self, device: torch.device | str = "cpu") -> Tensor:
        """The weight [N, K] as numbers, in its dtype.

        Raises:
            CheckpointError: the tensors do not make a weight.
        """
        if self.values is None:
            return self.read(device).dequantize()
        dense = self.values({part: stored.read(device) for part, stored in self.parts.items()})
        if not torch.isfinite(dense).all():
            file = next(iter(self.parts.values())).path
            raise CheckpointError(f"{file}: weight {self.name!r} is damaged: it is not finite")
        return dense


@dataclass(frozen=True)
class DenseWeight:
    """A quantized weight in files that is held dense: what looks rows up in it takes no other."""

    packed: PackedWeight

    @property
    def shape(self) -> tuple[int, ...]:
        return self.packed.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.packed.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, device: torch.device | str = "cpu") -> Tensor:
        return self.packed.read_dense(device)


def held(weight: GroupedWeight, dtype: torch.dtype) -> GroupTensor:
    """A weight as the tensor [N, K] that a model of that dtype holds."""
    return tensor_class(weight.bits).from_words(
        weight.words, weight.in_features, weight.scale, weight.zero_point, dtype=dtype, perm=weight.perm
    )
