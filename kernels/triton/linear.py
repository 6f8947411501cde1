# mypy: disable-error-code="no-untyped-def, assignment, misc"
"""x·Wᵀ with a packed W: one kernel for all numbers of rows.

    y[m, n] = Σ_groups scale[n, group] · Σ_{k in group} (code[n, k] − zero_point[n, group])·x[m, k]  +  bias[n]

The roles are exchanged: the weight is the left operand of the matrix instruction and xᵀ the right one. So what is
unpacked goes from registers straight into the instruction, not through shared memory, and few rows of x waste little of
it, as it takes them by eights.

W [N, K] in the layout of `codes/tiles.py`, any N and K; x [M, K] contiguous, bf16 or fp16; sums in fp32. What lies
beyond the last tile is read as the last one, which does no harm: rows beyond N are not stored, and x counts as zero
beyond K and M. A stack of E weights is one launch: with x [E, M, K], or with x [M, K] sorted by expert and `offsets`,
where each expert's rows end. How the work is cut: `heuristics.LinearConfig`, whose attributes are the constants here:
BM, BN, BK = block_m, block_n, block_k.
"""

import triton
import triton.language as tl

from gptq_ao.kernels.triton.expert_rows import find_rows, most_blocks
from gptq_ao.kernels.triton.read import prefetch_weight, read_weight, read_x
from gptq_ao.kernels.triton.unpack import unpack

__all__ = ["add_splits_kernel", "linear_kernel"]


@triton.jit
def _scale(word):
    """The scale in a word of scale and zero point, as fp32."""
    return (word & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _multiply(
    total,
    q,
    high,
    word,
    x,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SLICES: tl.constexpr,
    SCALE_SUM: tl.constexpr,
    FAST: tl.constexpr,
    NATURAL: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """`total`, to which the product of one step is added."""
    # KE: columns of a tile. NT and KT: tiles in a block, along rows and along columns.
    KE: tl.constexpr = 128 if BITS < 4 else 256 // BITS
    NT: tl.constexpr = BN // 16
    KT: tl.constexpr = BK // KE
    zero = word >> 16
    # Tiles come in the order in which warps share them, see `_tiles` in `read.py`.
    if SLICES == 1:
        w = unpack(q, high, zero, 1, KT, NT, BITS, FAST, NATURAL, COMPUTE)
    else:
        w = unpack(q, high, zero, NT, KT, SLICES, BITS, FAST, NATURAL, COMPUTE)
    scale = _scale(word)
    # A step may hold several groups here, so each weight gets its own scale before the product.
    if not SCALE_SUM:
        w *= scale.to(COMPUTE)[:, :, None]
    x = x.to(COMPUTE)
    if not NATURAL:  # rows of xᵀ have to be in the order of the columns of w, see `unpack`
        x = x.reshape(SLICES * BK // 16, 2, 4, 2, BM).permute(0, 2, 1, 3, 4)
    if SLICES > 1:
        w = w.reshape(SLICES, BN, BK)
        x = x.reshape(SLICES, BK, BM)
    else:
        w = w.reshape(BN, BK)
        x = x.reshape(BK, BM)
    # The step lies in one group: with few rows of x, its sums are fewer than its weights.
    if SCALE_SUM and GROUP > 0:
        if SLICES > 1:
            total += tl.dot(w, x) * scale.reshape(SLICES, BN, 1)
        else:
            total += tl.dot(w, x) * scale
    else:
        total = tl.dot(w, x, total)
    return total


@triton.jit
def _settled(total):
    """The same numbers, once they are there. Triton lets the asynchronous products of a step run on while the next
    step's weights are unpacked, into registers that those products may still be reading: with large blocks the results
    were wrong. An (empty) instruction that takes the sums makes it wait for them."""
    return tl.inline_asm_elementwise("", "=r,0", [total], tl.float32, is_pure=True, pack=1)


@triton.jit(do_not_specialize=["M"])
def linear_kernel(
    x,
    qdata,
    high,
    scale_zero,
    bias,
    y,
    partial,
    counters,
    offsets,  # None unless the rows of x are sorted by expert
    residual,  # None, or as y: what is added to it
    M,
    N,
    K,
    groups,
    EXPERTS: tl.constexpr,  # number of experts that share the rows of x, if there are offsets
    BITS: tl.constexpr,
    GROUP: tl.constexpr,  # columns that share a scale; 0: all of a row
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SLICES: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    SCALE_SUM: tl.constexpr,
    LAST_ADDS: tl.constexpr,
    EVEN: tl.constexpr,  # whether all steps of all programs are full
    POLICY: tl.constexpr,
    AHEAD: tl.constexpr,  # columns to prefetch while the kernel before still runs; 0: this one starts when that is done
    SHARED: tl.constexpr,  # least bytes of shared memory: read by `launch.Kernel`, not here
    FAST: tl.constexpr,
    NATURAL: tl.constexpr,
    ASYNC: tl.constexpr,  # whether the matrix instruction may be an asynchronous one
    COMPUTE: tl.constexpr,
):
    """One block [BM, BN] of y, or, with a split, of one summand of it: program (block, part of the split, expert)."""
    KE: tl.constexpr = 128 if BITS < 4 else 256 // BITS
    STEP: tl.constexpr = SLICES * BK
    block, split, expert = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row_tiles, column_tiles = tl.cdiv(N, 16), tl.cdiv(K, KE)
    if AHEAD > 0:
        if offsets is None:  # `offsets` cannot be read yet: the kernel before may be writing them
            before, first = expert.to(tl.int32) * row_tiles, split * tl.cdiv(tl.cdiv(K, STEP), SPLIT) * STEP
            tile, end = before + block // tl.cdiv(M, BM) * (BN // 16), before + row_tiles
            prefetch_weight(
                qdata, high, scale_zero, first, tile, end, column_tiles, groups, BN // 16, BITS, GROUP, AHEAD
            )
        # From here on all that was launched before is done, and what comes next may begin to do the same as this.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    # Blocks that share rows of the weight are neighbours: they find what one of them has read in the L2 cache.
    if offsets is None:
        m_blocks = tl.cdiv(M, BM)
        m = block % m_blocks * BM + tl.arange(0, BM)
        first_row = expert * M
    else:
        # The host launched as many programs as any offsets can need, see `expert_rows.py`.
        m_blocks = most_blocks(M, EXPERTS, BM)
        owner, begin, M = find_rows(offsets, block % m_blocks, M, EXPERTS, BM)
        expert, first_row = owner.to(tl.int64), begin.to(tl.int64)
        m = tl.arange(0, BM)
        if owner >= EXPERTS:  # nobody's rows, if there are any: zeros
            n = block // m_blocks * BN + tl.arange(0, BN)
            at = (first_row + m)[:, None] * N + n[None, :]
            mask = (m < M)[:, None] & (n < N)[None, :]
            tl.store(y + at, tl.zeros((BM, BN), y.dtype.element_ty), mask=mask)
            return
    x += first_row * K
    n0 = block // m_blocks * BN
    tile_row = n0 // 16
    # All slices have the same rows, hence the remainder.
    row = tl.minimum(n0 + tl.arange(0, SLICES * BN) % BN, row_tiles * 16 - 1)
    # A tile has 128 words of codes and 64 of high bits; 16 rows have 16 words of scale and zero for each group.
    qdata += expert * row_tiles * column_tiles * 128
    scale_zero += expert * row_tiles * groups * 16
    if BITS == 3:
        high += expert * row_tiles * column_tiles * 64

    total = tl.zeros((SLICES, BN, BM), tl.float32) if SLICES > 1 else tl.zeros((BN, BM), tl.float32)
    steps = tl.cdiv(tl.cdiv(K, STEP), SPLIT)
    # The last part of a split may have fewer steps than the others.
    last = (split + 1) * steps if EVEN else tl.minimum((split + 1) * steps, tl.cdiv(K, STEP))
    word = tl.zeros((SLICES * BN, 1), tl.int32)
    if GROUP == 0:  # read once, not in each step
        word = tl.load(scale_zero + (row // 16 * groups * 16 + row % 16)[:, None])
    for i in tl.range(split * steps, last, num_stages=STAGES):
        q, h, each = read_weight(
            qdata, high, scale_zero, i * STEP, row, tile_row, row_tiles, column_tiles, groups,
            BN, BK, BITS, GROUP, SLICES, EVEN, POLICY,
        )  # fmt: skip
        if GROUP == 0:
            each = word
        x_step = read_x(x, i * STEP, m, M, K, STEP, EVEN)
        total = _multiply(
            total, q, h, each, x_step,
            BM, BN, BK, BITS, GROUP, SLICES, SCALE_SUM, FAST, NATURAL, COMPUTE,
        )  # fmt: skip
        if ASYNC:
            total = _settled(total)

    # With one scale for the whole row, it is applied to the sums once, at the end.
    if SLICES > 1:
        if SCALE_SUM and GROUP == 0:
            total *= _scale(word).reshape(SLICES, BN, 1)
        total = tl.sum(total, axis=0)
    elif SCALE_SUM and GROUP == 0:
        total *= _scale(word)

    n = n0 + tl.arange(0, BN)
    at = m[None, :] * N + n[:, None]
    mask = (m < M)[None, :] & (n < N)[:, None]
    y += first_row * N
    if SPLIT > 1:
        partial += expert * SPLIT * M * N
        tl.store(partial + split * M * N + at, total, mask=mask)
        if LAST_ADDS:
            tl.debug_barrier()  # all threads have stored before one of them says so
            counter = counters + expert * tl.num_programs(0) + block
            if tl.atomic_add(counter, 1, sem="acq_rel") == SPLIT - 1:
                total = tl.zeros((BN, BM), tl.float32)
                for part in range(SPLIT):  # always in this order: the result does not depend on who comes last
                    total += tl.load(partial + part * M * N + at, mask=mask, other=0.0, cache_modifier=".cg")
                if bias is not None:
                    total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
                if residual is not None:
                    total += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
                tl.store(y + at, total.to(y.dtype.element_ty), mask=mask)
                tl.store(counter, 0)  # for the next launch
    else:
        if bias is not None:
            total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        if residual is not None:
            total += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(y + at, total.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def add_splits_kernel(partial, bias, residual, y, M, N, SPLIT: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr):
    """y [E, M, N] = Σ_split partial [E, SPLIT, M, N] + bias + residual [M, N], in the order of the splits."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.program_id(1).to(tl.int64)
    mask = i < M * N
    if AHEAD > 0:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    partial += expert * SPLIT * M * N
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLIT):
        total += tl.load(partial + split * M * N + i, mask=mask, other=0.0)
    if bias is not None:
        total += tl.load(bias + i % N, mask=mask, other=0.0).to(tl.float32)
    if residual is not None:  # then there is one matrix
        total += tl.load(residual + i, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + expert * M * N + i, total.to(y.dtype.element_ty), mask=mask)
