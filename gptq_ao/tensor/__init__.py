"""A quantized weight as a tensor. Importing this registers its operators, before its classes are made."""

from gptq_ao.tensor.classes import Int2GroupTensor, Int3GroupTensor, Int4GroupTensor, Int8GroupTensor, tensor_class
from gptq_ao.tensor.group_tensor import GroupTensor

__all__ = ["GroupTensor", "Int2GroupTensor", "Int3GroupTensor", "Int4GroupTensor", "Int8GroupTensor", "tensor_class"]
