# mypy: disable-error-code="no-untyped-def, assignment"
"""What a model computes between its products, for few rows: small kernels of little work, whose launches count.

Compilers make good kernels of these, too. These ones let the next kernel start while they run (programmatic dependent
launch): by the time they are done, it has the beginning of its weight in the cache. `kernels/reference.py` says what
they compute.
"""

import triton
import triton.language as tl

__all__ = ["gated_kernel", "rms_norm_kernel"]


@triton.jit
def _begin(AHEAD: tl.constexpr):
    """From here on all that was launched before is done, and what comes next may be placed."""
    if AHEAD:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def rms_norm_kernel(
    x, weight, y, K: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """y [rows, K], contiguous, one row a program; rows of x are STRIDE apart."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    mask = k < K
    _begin(AHEAD)
    w = tl.load(weight + k, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(x + row * STRIDE + k, mask=mask, other=0.0).to(tl.float32)
    v *= tl.rsqrt(tl.sum(v * v, 0) / K + EPS)
    tl.store(y + row * K + k, (v * (w + OFFSET)).to(y.dtype.element_ty), mask=mask)


@triton.jit
def gated_kernel(
    gate, x, y, K: tl.constexpr, GATE: tl.constexpr, X: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """y [rows, K], contiguous; program (block of columns, row). GATE, X: strides of rows."""
    row = tl.program_id(1).to(tl.int64)
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = k < K
    _begin(AHEAD)
    g = tl.load(gate + row * GATE + k, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(x + row * X + k, mask=mask, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        a = g / (1 + tl.exp(-g))
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh(u)) / 2 is the logistic function of 2·u
        a = g / (1 + tl.exp(-1.5957691216057308 * (g + 0.044715 * g * g * g)))
    else:
        a = 0.5 * g * (1 + tl.erf(g * 0.7071067811865476))
    tl.store(y + row * K + k, (a * v).to(y.dtype.element_ty), mask=mask)
