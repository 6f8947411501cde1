"""Time of other projects' products with 4-bit weights, where they are installed; their results are not checked.

Weights are random and packed by their own functions. What is in vLLM and FBGEMM is loaded from the library that holds
their kernels, without the rest of the package.
"""

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptq_ao.kernels.tuning.timing import BEYOND_CACHE, microseconds

__all__ = ["PEERS", "dense_us", "peer_us"]

BF16 = torch.bfloat16
# vLLM's number for codes 0 … 15 that mean −8 … 7: four bits of mantissa, a bias of 8, nothing but numbers.
UINT4_MINUS_8 = 4 << 8 | 8 << 17 | 1 << 50

Call = Callable[[Tensor], Any]


@functools.cache
def dense_us(n: int, k: int, m: int) -> float:
    """cuBLAS, bf16."""
    weights = [torch.randn(n, k, device="cuda", dtype=BF16) for _ in range(-(-BEYOND_CACHE // (2 * n * k)))]
    x = torch.randn(m, k, device="cuda", dtype=BF16)
    return microseconds(lambda i: F.linear(x, weights[i]), len(weights), calls=24 if m > 64 else 96)


def _codes(n: int, k: int) -> Tensor:
    return torch.randint(0, 16, (n, k), device="cuda", dtype=torch.uint8)


def _tinygemm(n: int, k: int, group: int) -> Call:
    pairs = torch.randint(0, 256, (n, k // 2), device="cuda", dtype=torch.uint8)
    weight = torch.ops.aten._convert_weight_to_int4pack(pairs, 8)
    scales = torch.rand(k // group, n, 2, device="cuda", dtype=BF16)
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, weight, group, scales)


def _gemlite(n: int, k: int, group: int) -> Call:
    import gemlite  # type: ignore[import-not-found]
    from gemlite.core import DType, GemLiteLinear  # type: ignore[import-not-found]

    if "H200" in torch.cuda.get_device_name():  # of which it has no measured configurations, but for its sibling
        GemLiteLinear.load_config(str(Path(gemlite.__file__).parent / "configs" / "h100.json"))
    layer = GemLiteLinear(4, group, k, n, DType.BF16, DType.BF16)
    scales = torch.rand(n * k // group, 1, device="cuda", dtype=BF16)
    layer.pack(_codes(n, k), scales, torch.full_like(scales, 8), None)
    call: Call = layer
    return call


def _gptq_words(n: int, k: int) -> Tensor:
    return torch.randint(-(2**31), 2**31, (k // 8, n), device="cuda", dtype=torch.int32)


def _marlin(n: int, k: int, group: int) -> Call:
    _load("vllm", "_C.abi3.so")
    none = torch.empty(0, device="cuda", dtype=torch.int32)
    weight = torch.ops._C.gptq_marlin_repack(_gptq_words(n, k), none, k, n, 4, False)
    scales = torch.rand(k // group, n, device="cuda", dtype=BF16)
    sms = torch.cuda.get_device_properties().multi_processor_count
    locks = torch.zeros(sms, device="cuda", dtype=torch.int32)
    settings = (True, False, True, False)  # is_k_full, use_atomic_add, use_fp32_reduce, is_zp_float: vLLM's defaults

    def call(x: Tensor) -> Any:
        rest = (None, None, None, None, None, locks, UINT4_MINUS_8, len(x), n, k, *settings)
        return torch.ops._C.marlin_gemm(x, None, weight, None, scales, *rest)

    return call


def _machete(n: int, k: int, group: int) -> Call:
    _load("vllm", "_C.abi3.so")
    by_columns = _gptq_words(n, k).t().contiguous().t()
    weight = torch.ops._C.machete_prepack_B(by_columns, BF16, UINT4_MINUS_8, BF16)
    scales = torch.rand(k // group, n, device="cuda", dtype=BF16)
    kind = UINT4_MINUS_8
    return lambda x: torch.ops._C.machete_mm(x, weight, kind, None, scales, None, group, None, None, None)


def _preshuffled(n: int, k: int, group: int) -> Call:
    _load("fbgemm_gpu", "experimental/gen_ai/fbgemm_gpu_experimental_gen_ai.so")
    pairs = torch.randint(-128, 128, (n, k // 2), device="cuda", dtype=torch.int8)
    scales = torch.rand(k // group, n, device="cuda", dtype=BF16)
    weight, scales = torch.ops.fbgemm.preshuffle_i4(pairs, scales)
    zeros = torch.zeros_like(scales)
    return lambda x: torch.ops.fbgemm.bf16i4bf16_shuffled(x, weight, scales, zeros)


def _load(package: str, library: str) -> None:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    torch.ops.load_library(str(Path(next(iter(spec.submodule_search_locations or []))) / library))


# What is timed, by the package that brings it.
PEERS: dict[str, tuple[str, Callable[[int, int, int], Call]]] = {
    "tinygemm": ("torch", _tinygemm),
    "marlin": ("vllm", _marlin),
    "machete": ("vllm", _machete),
    "fbgemm": ("fbgemm_gpu", _preshuffled),
    "gemlite": ("gemlite", _gemlite),
}


def peer_us(name: str, n: int, k: int, m: int, group: int) -> str:
    """Microseconds; or "absent", or what went wrong."""
    package, make = PEERS[name]
    if importlib.util.find_spec(package) is None:
        return "absent"
    try:
        layers = [make(n, k, group) for _ in range(-(-BEYOND_CACHE // (n * k // 2)))]
        x = torch.randn(m, k, device="cuda", dtype=BF16)
        return f"{microseconds(lambda i: layers[i](x), len(layers), calls=24 if m > 64 else 96):.1f}"
    except Exception as error:  # of another project: say so and go on
        return type(error).__name__
