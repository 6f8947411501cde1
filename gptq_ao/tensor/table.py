"""Where handlers of operators are entered: the tables that torchao keeps for `GroupTensor`.

A handler is called with (func, types, args, kwargs): the operator, and what it was called with. `implements` is for
operators below autograd, `implements_torch_function` for functions above it.
"""

import torch

from gptq_ao.tensor.group_tensor import GroupTensor

__all__ = ["aten", "implements", "implements_torch_function"]

aten = torch.ops.aten
implements = GroupTensor.implements
implements_torch_function = GroupTensor.implements_torch_function
