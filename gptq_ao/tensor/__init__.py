"""Quantized weights as tensors: what a module's parameter becomes.

`Int4GroupTensor` (and its 2-, 3- and 8-bit siblings) behaves like the dense weight it stands for: same shape, a dtype
to compute in, `F.linear`, `mm`, `addmm` and `bmm` with it, `.to()`, `state_dict`, `torch.compile`. Inside are int32
tensors in the layout that `codes/tiles.py` draws. A weight that a model stores as [in, out] (GPT-2) is the transposed
view of one.
"""

from gptq_ao.tensor.classes import Int2GroupTensor, Int3GroupTensor, Int4GroupTensor, Int8GroupTensor, tensor_class
from gptq_ao.tensor.group_tensor import GroupTensor

__all__ = ["GroupTensor", "Int2GroupTensor", "Int3GroupTensor", "Int4GroupTensor", "Int8GroupTensor", "tensor_class"]
