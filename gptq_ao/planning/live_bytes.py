"""Counts what operators allocate and free: bytes, and the work they do."""

import weakref
from collections import Counter
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils.flop_counter import flop_registry

__all__ = ["LiveBytes", "storages"]


class LiveBytes(TorchDispatchMode):
    """Within, follows every storage that an operator returns, until it is freed. Works on fake tensors (entered after
    their mode) as on real ones. What a single operator needs inside and frees again is not seen.

    Attributes:
        live, peak: bytes by type of device, now and at most since `restart`.
        flops: of products, by dtype.
        moved: bytes that other operators read and wrote, by type of device; views move nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.flops: Counter[torch.dtype] = Counter()
        self.moved: Counter[str] = Counter()
        self._known: set[int] = set()

    def restart(self) -> None:
        """Count peak and work from now on; what is live stays counted."""
        self.peak = Counter(self.live)
        self.flops, self.moved = Counter(), Counter()

    def add(self, *tensors: Tensor) -> int:
        """Follow tensors that exist already. Returns the bytes of those that were not followed yet."""
        new = 0
        for t in tensors:
            for key, storage in storages(t).items():
                if key in self._known or t.device.type == "meta":
                    continue
                kind, size = t.device.type, storage.nbytes()
                self._known.add(key)
                self.live[kind] += size
                self.peak[kind] = max(self.peak[kind], self.live[kind])
                # A view shares its storage: bytes are live until the last tensor on it is gone.
                weakref.finalize(storage, self._freed, key, kind, size).atexit = False
                new += size
        return new

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "gptq_ao":
            with self:  # written in Python: its operators count
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        # In place, and torch 2.11 cannot run it on fakes.
        in_place = func is torch.ops.aten.addmm.dtype_out
        out = kwargs["out"] if in_place else func(*args, **kwargs)
        made = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        new = self.add(*made)
        count = flop_registry.get(_counted_as(func))
        if count is not None and given:
            # The second argument is an operand in all of them; the first may be what the product is added to. Torch's
            # formulas do not know an out_dtype.
            operands = [a for a in args if not isinstance(a, torch.dtype)]
            self.flops[args[1].dtype] += count(*operands, out_val=out)
        elif new or func._schema.is_mutable:
            read = sum(s.nbytes() for t in given for s in storages(t).values())
            self.moved[next(t.device.type for t in (*made, *given))] += new + read
        return out

    def _freed(self, key: int, kind: str, size: int) -> None:
        self._known.discard(key)
        self.live[kind] -= size


def storages(t: Tensor) -> dict[int, torch.UntypedStorage]:
    """The storages that a tensor of any shape, or a tensor subclass made of several, keeps alive, by address."""
    subclass: Any = t
    if is_traceable_wrapper_subclass(subclass):
        inner = [storages(getattr(t, name)) for name in subclass.__tensor_flatten__()[0]]
        return {key: s for found in inner for key, s in found.items()}
    storage = t.untyped_storage()
    return {storage._cdata: storage}


def _counted_as(func: Any) -> Any:
    # Attention on the CPU is not in torch's table; it takes its first arguments like this one.
    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    packet = func._overloadpacket
    return torch.ops.aten._scaled_dot_product_flash_attention if packet is on_cpu else packet
