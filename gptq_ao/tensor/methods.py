"""Methods that go to a tensor's memory, past all operators: a quantized weight has its memory in parts."""

import warnings
from typing import Any

import torch
from torch import Tensor

from gptq_ao.tensor.copies import kind_of
from gptq_ao.tensor.group_tensor import GroupTensor
from gptq_ao.tensor.sharding import called_from
from gptq_ao.tensor.table import aten, implements, implements_torch_function
from gptq_ao.tensor.values import refuse_to_write


@implements_torch_function([Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__])
def read_out(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """What leaves torch is the dense weight."""
    return func(args[0].dequantize(), *args[1:], **kwargs)


@implements_torch_function(Tensor.data_ptr)
def data_ptr(func: Any, types: Any, args: Any, kwargs: Any) -> int:
    """The address of the codes: whatever groups tied weights by it must not take all quantized weights for one.

    Below this table, where torch saves and copies tensors, it is 0: that tells torch that there are parts. Where it
    copies a state dict to save it in the background, too."""
    address: int = 0 if called_from("torch.distributed.checkpoint.") else args[0].qdata.data_ptr()
    return address


@implements_torch_function([Tensor.apply_, Tensor.map_, Tensor.map2_])
def write_through(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """Call a Python function for each element.

    Raises:
        NotImplementedError: always.
    """
    refuse_to_write(next(a for a in args if isinstance(a, GroupTensor)), func.__name__)


@implements_torch_function(Tensor.__setitem__)
def set_item(func: Any, types: Any, args: Any, kwargs: Any) -> None:
    """`target[index] = value`: one matrix of a stack from another, or values into a dense tensor.

    Raises:
        NotImplementedError: other parts of a quantized weight would change.
    """
    target, index, value = args
    if not isinstance(target, GroupTensor):
        # What `resize_token_embeddings` does with a quantized head: the new one is dense, and nobody would know.
        warnings.warn(
            f"the values of {value!r} are copied into a dense tensor: if that takes its place, it is not quantized",
            stacklevel=2,
        )
        target[index] = value.dequantize(target.dtype)
        return
    part = target[index] if isinstance(value, GroupTensor) else None
    # Only what is still packed is a view of the weight; anything else would be a copy.
    if not isinstance(part, GroupTensor):
        refuse_to_write(target, "item assignment")
    else:
        part.copy_(value)


@implements_torch_function(Tensor.data.__set__)  # type: ignore[attr-defined]
def set_data(func: Any, types: Any, args: Any, kwargs: Any) -> None:
    """`weight.data = other`: another quantized weight in this one's place, of any dtype, device and layout.

    Raises:
        TypeError: `other` is dense, or of another number of bits.
    """
    weight, other = args
    if type(weight) is not type(other):
        raise TypeError(
            f"{kind_of(other)} cannot be the data of {weight!r}: give the module a new parameter instead, "
            "module.weight = torch.nn.Parameter(value, requires_grad=False)"
        )
    with torch._C.DisableTorchFunctionSubclass():
        func(weight, other)  # shape, strides, dtype and device, which torch itself keeps
    for name, part in vars(other.replace()).items():
        setattr(weight, name, part)


@implements_torch_function(Tensor.share_memory_)
def share_memory(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    """The parts are moved to shared memory, each by itself."""
    weight: GroupTensor = args[0]
    for part in weight.parts().values():
        part.share_memory_()
    return weight


@implements_torch_function(Tensor.is_shared)
def is_shared(func: Any, types: Any, args: Any, kwargs: Any) -> bool:
    """Whether all parts are in shared memory."""
    return all(part.is_shared() for part in args[0].parts().values())


@implements([aten.is_pinned.default])
def is_pinned(func: Any, types: Any, args: Any, kwargs: Any) -> bool:
    """Whether all parts are in pinned memory."""
    return all(func(part, *args[1:], **kwargs) for part in args[0].parts().values())


@implements([aten._pin_memory.default])
def pin_memory(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    """The same weight in pinned memory, from which a GPU can be filled in the background."""
    pinned: Tensor = args[0]._apply_fn_to_data(lambda part: func(part, *args[1:], **kwargs))
    return pinned


@implements([aten.record_stream.default])
def record_stream(func: Any, types: Any, args: Any, kwargs: Any) -> None:
    """The parts' memory is in use by a stream."""
    for part in args[0].parts().values():
        func(part, *args[1:], **kwargs)
