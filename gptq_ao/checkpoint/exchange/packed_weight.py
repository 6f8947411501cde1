"""A quantized weight that lies in a checkpoint of another format, and is read when it is asked for."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gptq_ao.checkpoint.exchange.grouped_weight import GroupedWeight
from gptq_ao.checkpoint.files.shards import StoredTensor
from gptq_ao.errors import CheckpointError, ConfigError, NonFiniteError, RoundedScalesWarning
from gptq_ao.tensor import GroupTensor, tensor_class

__all__ = ["PackedWeight", "Rounding", "held"]


@dataclass
class Rounding:
    """Collects, over a checkpoint, which weights have scales that had to be rounded to fp16."""

    changes: dict[str, float] = field(default_factory=dict)

    def warn(self) -> None:
        """One RoundedScalesWarning for all of them, if there are any; the next call starts anew."""
        if not self.changes:
            return
        worst = max(self.changes, key=self.changes.__getitem__)
        warnings.warn(
            f"{len(self.changes)} weights of the checkpoint have scales that are not fp16 numbers. They were rounded "
            f"to the nearest; the largest change of one is {self.changes[worst]:.1e} of itself, in {worst!r}",
            RoundedScalesWarning,
            stacklevel=3,
        )
        self.changes.clear()


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
        rounding: record of the checkpoint, for the case that scales have to be rounded.
    """

    name: str
    bits: int
    group_size: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: Mapping[str, StoredTensor]
    decode: Callable[[Mapping[str, Tensor]], GroupedWeight]
    rounding: Rounding

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
            return held(weight, self.dtype)
        except (CheckpointError, ConfigError, NonFiniteError) as e:
            file = next(iter(self.parts.values())).path
            raise CheckpointError(f"{file}: weight {self.name!r} is damaged: {e}") from e


def held(weight: GroupedWeight, dtype: torch.dtype) -> GroupTensor:
    """A weight as the tensor [N, K] that a model of that dtype holds."""
    return tensor_class(weight.bits).from_words(
        weight.words, weight.in_features, weight.scale, weight.zero_point, dtype=dtype, perm=weight.perm
    )
