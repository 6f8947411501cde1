"""The classes of quantized weights, one for each number of bits."""

import torch

# First: torchao gives a subclass a copy of its base's table of operators at the moment the class is made. An operator
# that is registered later would be missing in these four, which shows only under torch.compile.
from gptq_ao.tensor import collectives, copies, empty, methods, products, views  # noqa: F401
from gptq_ao.tensor.group_tensor import GroupTensor

__all__ = ["Int2GroupTensor", "Int3GroupTensor", "Int4GroupTensor", "Int8GroupTensor", "tensor_class"]

ROOM = "gptq_ao.tensor"  # where users import them from; `torch.save` writes this path into its files


class Int2GroupTensor(GroupTensor):
    """A weight of 2-bit codes, see `GroupTensor`."""

    __module__ = ROOM
    bits = 2


class Int3GroupTensor(GroupTensor):
    """A weight of 3-bit codes, see `GroupTensor`."""

    __module__ = ROOM
    bits = 3


class Int4GroupTensor(GroupTensor):
    """A weight of 4-bit codes, see `GroupTensor`."""

    __module__ = ROOM
    bits = 4


class Int8GroupTensor(GroupTensor):
    """A weight of 8-bit codes, see `GroupTensor`."""

    __module__ = ROOM
    bits = 8


# So that `torch.load` reads them with `weights_only=True`, its default.
torch.serialization.add_safe_globals([Int2GroupTensor, Int3GroupTensor, Int4GroupTensor, Int8GroupTensor])


def tensor_class(bits: int) -> type[GroupTensor]:
    """The class of weights of 2, 3, 4 or 8 bits."""
    return {2: Int2GroupTensor, 3: Int3GroupTensor, 4: Int4GroupTensor, 8: Int8GroupTensor}[bits]
