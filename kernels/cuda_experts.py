"""What `gptq_ao::grouped_linear` runs on a CUDA device: rows of x, sorted by expert, by a stack of packed weights.

    few rows per expert     one launch of `triton/linear.py`, whose programs find their expert's rows in `offsets`
    many, or no such kernel dequantize some output features of all experts, multiply by torch's grouped_mm, and so on

Nothing here reads `offsets` on the host, so that CUDA graphs work. (torch's grouped_mm does, except for bf16 on Hopper
and later.) The host knows how many rows and experts there are, and launches as many programs as any offsets can need;
those that find no rows end at once. Rows count as few or many by their average number per expert.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from gptq_ao.codes.tiles import TILE_ROWS
from gptq_ao.kernels import cuda
from gptq_ao.kernels.packed import Packed
from gptq_ao.kernels.reference import check_experts
from gptq_ao.kernels.tuning import heuristics

__all__ = ["linear"]


def linear(x: Tensor, packed: Packed, offsets: Tensor) -> Tensor:
    """See `reference.linear_experts`: [rows, N] in the dtype of x [rows, K]. Sums are in fp32, and scales may be
    applied to sums rather than to weights."""
    check_experts(x, packed, offsets)
    qdata, _, _, perm, bits, group_size, out_features, in_features = packed
    if len(x) == 0:
        return x.new_empty(0, out_features)
    x = (x if perm is None else x[:, perm]).contiguous()
    offsets = offsets.to(torch.int32).contiguous()
    if packed.is_contiguous():
        numbers = (bits, group_size, out_features, in_features)
        config = _config(cuda.bucket(len(x)), *numbers, len(qdata), x.dtype, x.device)
        if config is not None:
            from gptq_ao.kernels.triton.launch_experts import launch_experts

            return launch_experts(x, packed, offsets, config)
    packed = packed._replace(perm=None)  # x is in the order of the codes
    # Parts by output features, not by experts: where the rows of an expert begin is not known here.
    most = max(1, cuda.SCRATCH // (len(qdata) * TILE_ROWS * in_features * x.itemsize)) * TILE_ROWS
    y = x.new_empty(len(x), out_features)
    for first in range(0, out_features, most):
        last = min(first + most, out_features)
        weight = cuda.dequantize(packed.rows(first, last), x.dtype)
        y[:, first:last] = F.grouped_mm(x, weight.mT, offs=offsets)
    # grouped_mm does not write rows that belong to no expert.
    beyond = torch.arange(len(x), device=x.device) >= offsets[-1]
    return y.masked_fill_(beyond.unsqueeze(1), 0)


@functools.cache
def _config(
    rows: int,
    bits: int,
    group_size: int,
    out_features: int,
    in_features: int,
    experts: int,
    dtype: torch.dtype,
    device: torch.device,
) -> heuristics.LinearConfig | None:
    if rows > experts * cuda.max_rows(device, dtype, bits, group_size, in_features):
        return None
    p = torch.cuda.get_device_properties(device)
    sms, capability = p.multi_processor_count, p.major
    return heuristics.choose_experts(rows, out_features, in_features, bits, group_size, experts, sms, capability)
