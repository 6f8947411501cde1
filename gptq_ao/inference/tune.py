"""Measure which configuration of the linear kernel is the fastest for a model's weights on this GPU."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from gptq_ao.errors import TuningError
from gptq_ao.kernels import cuda
from gptq_ao.kernels.packed import Packed
from gptq_ao.kernels.tuning import measured
from gptq_ao.kernels.tuning.candidates import candidates
from gptq_ao.kernels.tuning.heuristics import FUSED_ROWS, LinearConfig
from gptq_ao.kernels.tuning.measured import Product, Tuned
from gptq_ao.tensor import GroupTensor

__all__ = ["tune"]


def tune(model: nn.Module, rows: Sequence[int] = (1, 16, 64, 256), path: Path | str | None = None) -> Path:
    """Time all configurations worth trying for the quantized weights of a model, and write down the fastest.

    Models use what the file says from then on, in this process and in those that come. Without it they use a formula,
    so this is never needed. It takes minutes: each configuration is compiled once. Nothing of the model changes.

    Args:
        rows: numbers of rows of x (batch size times length) to tune for, each standing for those down to half of it.
        path: of the file, which is added to; None: `GPTQ_AO_TUNED` of the environment, or
            `~/.cache/gptq_ao/<device>.json`. Only those two are read later.

    Returns:
        The path.

    Raises:
        TuningError: no quantized weight is on a GPU that has kernels, or the file that is there is damaged.
    """
    weights: dict[Product, list[GroupTensor]] = {}
    for parameter in model.parameters():
        if isinstance(parameter, GroupTensor) and parameter.is_cuda and parameter.qdata.dim() == 3:
            # The kernel looks up the bucket of a number of rows, so each bucket is measured once.
            for count in sorted({cuda.bucket(r) for r in rows}):
                weights.setdefault(_product(parameter, count), []).append(parameter)
    if not weights:
        raise TuningError("no quantized matrix of the model is on a GPU: move it there first, model.cuda()")
    device = next(iter(weights.values()))[0].device
    name = torch.cuda.get_device_name(device)
    file = measured.default_path(name) if path is None else Path(path)
    # What was measured for other models stays in the file.
    entries = measured.load(file)
    # Kernels launch on the current device, which need not be that of the weights.
    with torch.cuda.device(device), torch.no_grad():
        for product, same in weights.items():
            entries[product] = _fastest(product, same)
    measured.save(file, name, entries)
    # This process has chosen configurations already and would keep them.
    cuda.forget()
    return file


def _product(weight: GroupTensor, rows: int) -> Product:
    return Product(rows, weight.out_features, weight.in_features, weight.bits, weight.group_size)


def _fastest(p: Product, weights: list[GroupTensor]) -> Tuned:
    from gptq_ao.kernels.tuning.timing import BEYOND_CACHE, microseconds

    size = weights[0].qdata.nbytes + weights[0].scale_zero.nbytes
    # As many weights as it takes to exceed the cache: in a model, too, other weights are read in between.
    count = -(-BEYOND_CACHE // size)
    # Few of a shape: more in memory, of the same values, so that none is still in the cache.
    # `Product` says nothing of an order of columns, so none is timed.
    ring = [Packed(*w.packed())._replace(perm=None) for w in weights[:count]]
    ring += [ring[0].each(torch.clone) for _ in range(count - len(ring))]
    x = torch.randn(1, p.rows, p.in_features, device="cuda", dtype=torch.bfloat16)
    # A configuration of None means: dequantize, then a dense product.
    best = Tuned(None, float("inf"))
    # Up to `FUSED_ROWS` the dense way is the slower one; the time to measure it is saved.
    if p.rows > min(FUSED_ROWS.values()):

        def dense(i: int) -> Tensor:
            return torch.mm(x[0], cuda.dequantize(ring[i], x.dtype).T)

        best = Tuned(None, microseconds(dense, count, calls=24))
    weight = cuda.dequantize(ring[0], torch.float32)
    # In fp32, so that a wrong kernel is not compared with rounding errors of the reference.
    expected = x[0].float() @ weight.T
    # Rounding to bf16 of weights (when multiplied by their scales) and of the result, with room to spare.
    tolerance = 2.0**-6 * (x[0].float().abs() @ weight.abs().T)
    properties = torch.cuda.get_device_properties()
    gpu = (properties.multi_processor_count, properties.major)
    for c in candidates(p.rows, p.out_features, p.in_features, p.bits, p.group_size, *gpu):
        took = _time(p, c, ring, x, expected, tolerance)
        if took < best.microseconds:
            best = Tuned(c, took)
    return best


def _time(p: Product, c: LinearConfig, ring: list[Packed], x: Tensor, expected: Tensor, tolerance: Tensor) -> float:
    """Microseconds; infinite if the GPU has not enough of something for this configuration, or if it is wrong (a
    compiler may be)."""
    import triton

    from gptq_ao.kernels.triton.launch import launch
    from gptq_ao.kernels.tuning.timing import microseconds

    blocks = -(-p.rows // c.block_m) * -(-p.out_features // c.block_n)
    counters = torch.zeros(blocks, dtype=torch.int32, device=x.device)

    def run(i: int) -> Tensor:
        return launch(x, ring[i], None, c, counters=counters)

    try:
        if not bool(((run(0)[0].float() - expected).abs() <= tolerance).all()):
            return float("inf")
        return microseconds(run, len(ring), replays=5)
    except triton.runtime.errors.OutOfResources:
        return float("inf")
