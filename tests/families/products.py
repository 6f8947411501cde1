"""Which parameters a model multiplies with activations, seen while it runs: independent of the pass that is tested.

Below autograd and above the kernels every product is one of a few operators. A tensor is a weight if its memory is a
parameter's, or if it was computed from parameters alone (a copy, a concatenation, a normalized weight).
"""

from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gptq_ao.calibration.batches import as_batch
from gptq_ao.passes.capture import calibration_mode

__all__ = ["multiplied_parameters"]

_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "addbmm", "convolution", "_grouped_mm", "_convolution", "mv", "addmv")
_RECURRENT = ("lstm", "gru", "rnn", "mkldnn_rnn_layer")
# Picking some experts of a stack of matrices leaves a stack of matrices.
_PICKS = ("index", "index_select", "gather", "select")


def multiplied_parameters(model: nn.Module, batch: Any) -> set[str]:
    """Names (of tied parameters the first) of all parameters of two or more dimensions that are an operand of a matrix
    product, a convolution or a recurrent layer whose other operand depends on the input."""
    b = as_batch(batch)
    with calibration_mode(model), _Watch(model) as watch:
        model(*b.args, **b.kwargs)
    return watch.found


class _Watch(TorchDispatchMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.found: set[str] = set()
        # Memory address → the parameters it came from. Tensors made on the way are kept, so that no address is reused.
        self.sources: dict[int, frozenset[str]] = {}
        self.alive: list[Tensor] = []
        for name, p in model.named_parameters():
            if p.dim() >= 2:
                self.sources[_address(p)] = frozenset({name})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        origins = [self.sources.get(_address(t), frozenset()) for t in tensors]
        weights = frozenset().union(*origins)
        if weights and len(tensors) > 1 and (name in _PRODUCTS or any(r in name for r in _RECURRENT)):
            operands = origins if any(r in name for r in _RECURRENT) else _operands(name, origins)
            if any(not o for o in operands):  # the other one is an activation
                self.found |= frozenset().union(*operands)
        elif weights and (all(origins) or (name in _PICKS and origins[0] and tensors[0].dim() >= 3)):
            for t in pytree.tree_leaves(out):
                if isinstance(t, Tensor) and _address(t) not in self.sources and t.dim() >= 2:
                    self.sources[_address(t)] = weights
                    self.alive.append(t)
        return out


def _operands(name: str, origins: list[frozenset[str]]) -> list[frozenset[str]]:
    """Without the summand of addmm and the like, and without a bias."""
    return origins[1:3] if name in ("addmm", "baddbmm", "addbmm", "addmv") else origins[:2]


def _address(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()
