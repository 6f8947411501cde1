"""Launches of `linear.py`: what is the same each time is found out once.

A product of few rows takes the GPU some microseconds, so what Python does before it counts. A `LinearLaunch` is all
that a shape of weight, a configuration and a device decide; a call is left with buffers and pointers.
"""

import dataclasses
import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptq_ao.kernels.packed import Packed
from gptq_ao.kernels.triton.counters import zeroed_counters
from gptq_ao.kernels.triton.linear import add_splits_kernel, linear_kernel
from gptq_ao.kernels.tuning.heuristics import SHARED_MEMORY, LinearConfig

__all__ = ["Kernel", "LinearLaunch", "constants", "launch", "launch_there", "prepared", "take_shared_memory", "warm_up"]

INTERPRETED = not isinstance(linear_kernel, triton.runtime.JITFunction)
VERSION = tuple(int(i) for i in triton.__version__.split(".")[:2])
# An operand of mma.sync made in registers: up to Triton 3.6 its columns are in an order of their own, see `unpack`.
NATURAL_MMA = VERSION > (3, 6)
DIRECT = (3, 6) <= VERSION <= (3, 9)  # versions whose `CompiledKernel` is known to have the attributes used below
ADD_BLOCK = 512  # results per program of the second kernel


def constants(
    c: LinearConfig,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
    capability: int,
    fast: bool,
    experts: int = 0,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The kernel's constants, and the compiler's options.

    Args:
        dtype: dtype of x, in which weights are multiplied. (In the interpreter fp32 for bf16, which it would truncate.)
        fast: see `LinearLaunch`.
        experts: number of experts that share the rows of x; 0 if each weight has its own.
    """
    step = c.slices * c.block_k
    # Whether Triton will use Hopper's wgmma, whose operand in registers has its columns in natural order.
    wgmma = capability == 9 and c.block_m >= 16 and c.block_n >= 64 and c.warps % 4 == 0 and c.slices == 1
    ahead = c.ahead if capability >= 9 else 0
    values = {
        "EXPERTS": experts,
        "BITS": bits,
        "GROUP": 0 if group_size == in_features else group_size,
        "BM": c.block_m,
        "BN": c.block_n,
        "BK": c.block_k,
        "SLICES": c.slices,
        "SPLIT": c.split,
        "STAGES": c.stages,
        "SCALE_SUM": c.scale_sum,
        "LAST_ADDS": c.last_adds,
        "EVEN": in_features % (step * c.split) == 0,
        "POLICY": "evict_first" if c.evict_first else "",
        "AHEAD": ahead,
        "SHARED": _shared_memory(c.per_sm) if ahead and capability <= 10 else 0,
        "FAST": fast,
        "NATURAL": wgmma or NATURAL_MMA,
        "ASYNC": capability == 9,
        "COMPUTE": tl.float16 if dtype == torch.float16 else tl.float32 if INTERPRETED else tl.bfloat16,
    }
    options = {"num_warps": c.warps, "num_stages": c.stages, "enable_fp_fusion": True}
    return values, options | ({"launch_pdl": True} if ahead else {})


def _shared_memory(per_sm: int) -> int:
    """The bytes that a program has to take so that only `per_sm` fit into a multiprocessor; 0: any number may."""
    # A little more than a (per_sm + 1)-th of all, in steps of 128 bytes: that many programs no longer fit.
    return (SHARED_MEMORY // (per_sm + 1) // 128 + 1) * 128 if per_sm else 0


class Kernel:
    """A Triton kernel with its constants, on one device: compiled by Triton, and then called past it.

    Triton's own launch takes some 20 µs to find the compiled kernel that fits its arguments. Dtypes, constants and the
    numbers that Triton compiles for are the same whenever this one is called. So it depends only on which tensors are
    None, and which begin at a multiple of 16 bytes.
    """

    def __init__(self, function: Any, constants: dict[str, Any], options: dict[str, Any]) -> None:
        self.function, self.constants, self.options = function, constants, options
        self.values = tuple(constants.values())
        self.compiled: dict[tuple[bool | None, ...], Any] = {}

    def __call__(
        self, grid: tuple[int, int, int], stream: int, tensors: tuple[Tensor | None, ...], numbers: tuple[Any, ...]
    ) -> None:
        """Launch it on the current device; `tensors`, then `numbers`, are the kernel's first arguments, in order."""
        pointers = [None if t is None else t.data_ptr() for t in tensors]
        kind = tuple([None if p is None else p % 16 == 0 for p in pointers])
        known = self.compiled.get(kind)
        if known is None:
            known = self._compile_and_launch(grid, tensors, pointers, numbers)
            # The interpreter has nothing compiled to keep.
            if not INTERPRETED:
                self.compiled[kind] = known
        elif DIRECT and not _watched():
            # In order: grid, stream, the compiled code, what hooks would be told and two hooks, the kernel's arguments.
            code = (known.function, known.packed_metadata)
            known.run(*grid, stream, *code, None, None, None, *pointers, *numbers, *self.values)
        else:
            known[grid](*pointers, *numbers, *self.values)

    def _compile_and_launch(self, grid: Any, tensors: Any, pointers: Any, numbers: Any) -> Any:
        shared = self.constants.get("SHARED")
        if not shared or not DIRECT:
            return self.function[grid](*tensors, *numbers, **self.constants, **self.options)
        # Compiled, but not loaded yet: shared memory is asked for when it is.
        known = self.function.warmup(*tensors, *numbers, grid=grid, **self.constants, **self.options)
        take_shared_memory(known, shared)
        known[grid](*pointers, *numbers, *self.values)
        return known


def launch_there(
    kernel: Kernel, grid: tuple[int, int, int], tensors: tuple[Tensor | None, ...], numbers: tuple[Any, ...]
) -> None:
    """Launch it on the device of the first tensor, which need not be the current one; see `Kernel`."""
    assert tensors[0] is not None
    device = tensors[0].get_device()
    if device < 0:
        kernel(grid, 0, tensors, numbers)
        return
    with torch.cuda.device(device):
        kernel(grid, torch._C._cuda_getCurrentRawStream(device), tensors, numbers)


def take_shared_memory(compiled: Any, least: int) -> None:
    """Make each program take at least `least` bytes of shared memory. Triton has no option for this, but loads and
    launches a kernel by its metadata, which are changed here."""
    from triton.compiler.compiler import make_backend  # where it is in the versions that `DIRECT` names

    if compiled.metadata.shared < least:
        compiled.metadata = compiled.metadata._replace(shared=least)
        compiled.packed_metadata = make_backend(compiled.metadata.target).pack_metadata(compiled.metadata)


def _watched() -> bool:
    """Whether somebody, such as a profiler, has asked Triton to be told of launches."""
    hooks = triton.knobs.runtime
    return bool(hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls)


@dataclasses.dataclass(frozen=True)
class LinearLaunch:
    """Products of x with `experts` weights [out_features, in_features] on one device, cut by one configuration.

    Attributes:
        device: index of the GPU; -1 for the CPU, in Triton's interpreter.
        fast: whether codes are cut out of words in pairs, see `unpack.py`.
    """

    config: LinearConfig
    bits: int
    group_size: int
    out_features: int
    in_features: int
    experts: int
    dtype: torch.dtype
    device: int
    fast: bool = not INTERPRETED

    @functools.cached_property
    def product(self) -> Kernel:
        """The kernel that reads codes; made at the first call, as it asks the device."""
        capability = torch.cuda.get_device_capability(self.device)[0] if self.device >= 0 else 0
        sizes = (self.bits, self.group_size, self.in_features)
        return Kernel(linear_kernel, *constants(self.config, *sizes, self.dtype, capability, self.fast))

    @functools.cached_property
    def add_splits(self) -> Kernel:
        """The second kernel, for a split whose sums the last program does not add up."""
        c = self.config
        ahead = self.product.constants["AHEAD"]
        values = {"SPLIT": c.split, "BLOCK": ADD_BLOCK, "AHEAD": ahead}
        options = {"num_warps": 4, "enable_fp_fusion": True} | ({"launch_pdl": True} if ahead else {})
        return Kernel(add_splits_kernel, values, options)

    @functools.cached_property
    def without_counters(self) -> "LinearLaunch":
        """The same, but a second kernel adds up the sums of a split: for a CUDA graph that gets no counters."""
        return dataclasses.replace(self, config=dataclasses.replace(self.config, last_adds=False))

    def __call__(
        self,
        x: Tensor,
        packed: Packed,
        bias: Tensor | None = None,
        counters: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """[..., N] from x [..., K], all contiguous, on the current device; x, bias [N] and result are of `self.dtype`.

        Args:
            packed: a matrix, or a stack of `self.experts`; columns of x are in the order of its codes.
            counters: int32 zeros, one for each program of one split, that no other launch uses at the same time. Those
                of this stream are taken if none are given.
            residual: as the result, which it is added to; by a matrix only.
        """
        c, experts, n, k = self.config, self.experts, self.out_features, self.in_features
        rows = x.numel() // (experts * k)
        blocks = -(-rows // c.block_m) * -(-n // c.block_n)
        stream = torch._C._cuda_getCurrentRawStream(self.device) if self.device >= 0 else 0
        if c.split == 1 or not c.last_adds:
            counters = None
        elif counters is None and rows:
            counters = self._counters(experts * blocks, stream)
            if counters is None:
                return self.without_counters(x, packed, bias, residual=residual)
        y = x.new_empty((*x.shape[:-1], n))
        # A grid of no programs cannot be launched.
        if rows == 0:
            return y
        # Allocated in each call, so that every CUDA graph has its own.
        partial = None if c.split == 1 else x.new_empty((experts, c.split, rows, n), dtype=torch.float32)
        tensors = (x, packed.qdata, packed.high_plane, packed.scale_zero, bias, y, partial, counters, None, residual)
        self.product((blocks, c.split, experts), stream, tensors, (rows, n, k, k // self.group_size))
        if c.split > 1 and not c.last_adds:
            self.add_splits((-(-rows * n // ADD_BLOCK), experts, 1), stream, (partial, bias, residual, y), (rows, n))
        return y

    def _counters(self, count: int, stream: int) -> Tensor | None:
        if self.device >= 0:
            return zeroed_counters(self.device, count, stream)
        return torch.zeros(count, dtype=torch.int32)


prepared = functools.cache(LinearLaunch)  # it keeps the kernels that it has compiled


def launch(
    x: Tensor,
    packed: Packed,
    bias: Tensor | None,
    c: LinearConfig,
    fast: bool = not INTERPRETED,
    counters: Tensor | None = None,
) -> Tensor:
    """[E, M, N] from x [E, M, K] and a stack of E weights, or from x [1, M, K] and a matrix; see `LinearLaunch`."""
    sizes = (packed.bits, packed.group_size, packed.out_features, packed.in_features, len(x))
    return prepared(c, *sizes, x.dtype, x.get_device(), fast)(x, packed, bias, counters)


def warm_up(
    c: LinearConfig,
    rows: int,
    bits: int,
    group_size: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
    fast: bool = True,
) -> None:
    """Compile what `launch` will run without a bias, into Triton's cache on disk. For a process that only compiles."""
    values, options = constants(c, bits, group_size, in_features, dtype, torch.cuda.get_device_capability()[0], fast)
    partial = torch.float32 if c.split > 1 else None
    counters = torch.int32 if c.split > 1 and c.last_adds else None
    high_plane = torch.int32 if bits == 3 else None
    tensors = (dtype, torch.int32, high_plane, torch.int32, None, dtype, partial, counters, None, None)
    numbers = (rows, out_features, in_features, in_features // group_size)
    linear_kernel.warmup(*tensors, *numbers, grid=(1, 1, 1), **values, **options)
