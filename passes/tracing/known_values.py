"""Operations on tensors whose values are known are done at once, instead of being traced.

So a model may turn such values into Python numbers: loop over them, branch on them, make sizes of them.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.overrides import TorchFunctionMode

__all__ = ["known_values"]

# Made of numbers only, their values are known. Others (zeros, empty) are made to be written to, perhaps by the graph.
_FACTORIES = {torch.arange, torch.tensor}


class _KnownValues(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        leaves = pytree.tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        # What takes a fake tensor or a symbol has no known value: it is traced as always.
        symbolic = any(isinstance(leaf, FakeTensor | torch.SymInt | torch.SymFloat | torch.SymBool) for leaf in leaves)
        if symbolic or not (tensors or func in _FACTORIES):
            return func(*args, **kwargs)
        # Past the trace: the result is a real tensor, whose values Python may ask for.
        with unset_fake_temporarily(), disable_proxy_modes_tracing():
            return func(*args, **kwargs)


@contextlib.contextmanager
def known_values() -> Iterator[None]:
    with _KnownValues():
        yield
