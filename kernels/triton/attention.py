# mypy: disable-error-code="no-untyped-def, assignment, misc"
"""Attention of one new token for each sequence: softmax(scale·q·kᵀ + mask)·v.

It reads keys and values where a cache has them, once for all heads of q that share them; and it leaves out blocks of
positions that are masked as a whole, such as those of a cache that are not in use yet. Positions are divided among
SPLIT programs, each with a maximum of its own (as in Flash-Decoding: Dao et al. 2023). The last one to come puts
their results together, in the order of their parts, whichever it is.
"""

import triton
import triton.language as tl

__all__ = ["attention_kernel"]


@triton.jit
def _attend(q, k, v, mask, s, S, total, largest, weight, KS: tl.constexpr, VS: tl.constexpr, MS: tl.constexpr,
            D: tl.constexpr, SCALE: tl.constexpr):  # fmt: skip
    """Sums [G, D], largest scores and sums of weights [G], to which positions `s` are added. All scores are in units of
    log₂: 2ˣ is what the hardware computes."""
    d = tl.arange(0, D)
    inside = s < S
    bias = tl.zeros(s.shape, tl.float32)
    if mask is not None:
        there = tl.load(mask + s * MS, mask=inside, other=0)
        if there.dtype.is_floating():
            bias = there.to(tl.float32) * 1.4426950408889634
        else:
            inside = inside & (there != 0)
    bias = tl.where(inside, bias, float("-inf"))
    inside = bias > float("-inf")  # what is not attended to is not read, and may be anything
    if tl.max(bias, 0) > float("-inf"):
        keys = tl.load(k + s[:, None] * KS + d[None, :], mask=inside[:, None], other=0.0)
        values = tl.load(v + s[:, None] * VS + d[None, :], mask=inside[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(keys)) * (SCALE * 1.4426950408889634) + bias[None, :]
        now = tl.maximum(largest, tl.max(scores, 1))
        # Minus infinity less itself is no number.
        base = tl.where(now == float("-inf"), 0.0, now)
        fade = tl.exp2(largest - base)
        p = tl.exp2(scores - base[:, None])
        weight = weight * fade + tl.sum(p, 1)
        total = total * fade[:, None] + tl.dot(p.to(values.dtype), values)
        largest = now
    return total, largest, weight


@triton.jit(do_not_specialize=["S"])
def attention_kernel(
    q, k, v, mask, y, partial, counters, S,
    HEADS: tl.constexpr,  # of keys and values
    SHARE: tl.constexpr,  # heads of q for each of them
    G: tl.constexpr,  # the same, filled up to what the matrix instruction takes
    D: tl.constexpr,  # of a head
    BLOCK: tl.constexpr,  # positions at a time
    SPLIT: tl.constexpr,
    SCALE: tl.constexpr,
    Q: tl.constexpr,  # strides: of batch and head
    K: tl.constexpr,  # of batch, head and position
    V: tl.constexpr,
    M: tl.constexpr,  # of batch and position
    AHEAD: tl.constexpr,  # whether it may be placed while the kernel before still runs
):  # fmt: skip
    """y [batch, HEADS·SHARE, D], contiguous; program (head of keys, part of positions, batch)."""
    head, part, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if AHEAD:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    g, d = tl.arange(0, G), tl.arange(0, D)
    mine = g < SHARE
    query = tl.load(
        q + batch * Q[0] + (head * SHARE + g)[:, None] * Q[1] + d[None, :], mask=mine[:, None], other=0.0
    )  # fmt: skip
    k += batch * K[0] + head * K[1]
    v += batch * V[0] + head * V[1]
    if mask is not None:
        mask += batch * M[0]
    total = tl.zeros((G, D), tl.float32)
    largest = tl.full((G,), float("-inf"), tl.float32)
    weight = tl.zeros((G,), tl.float32)
    # Parts take turns: what is in use of a cache lies at its beginning, and all are to have some of it.
    for first in range(part * BLOCK, S, SPLIT * BLOCK):
        s = first + tl.arange(0, BLOCK)
        total, largest, weight = _attend(query, k, v, mask, s, S, total, largest, weight, K[2], V[2], M[1], D, SCALE)

    row = batch * HEADS + head
    if SPLIT > 1:
        # Of each part: its sums, then the largest scores, then the sums of weights.
        partial += row * SPLIT * (G * (D + 2))
        at = partial + part * (G * (D + 2))
        tl.store(at + g[:, None] * D + d[None, :], total)
        tl.store(at + G * D + g, largest)
        tl.store(at + G * (D + 1) + g, weight)
        tl.debug_barrier()  # all threads have stored before one of them says so
        last = tl.atomic_add(counters + row, 1, sem="acq_rel") == SPLIT - 1
        if last:
            total = tl.zeros((G, D), tl.float32)
            largest = tl.full((G,), float("-inf"), tl.float32)
            weight = tl.zeros((G,), tl.float32)
            for p in range(SPLIT):
                at = partial + p * (G * (D + 2))
                its = tl.load(at + G * D + g, cache_modifier=".cg")
                now = tl.maximum(largest, its)
                base = tl.where(now == float("-inf"), 0.0, now)
                old, new = tl.exp2(largest - base), tl.exp2(its - base)
                sums = tl.load(at + g[:, None] * D + d[None, :], cache_modifier=".cg")
                total = total * old[:, None] + sums * new[:, None]
                weight = weight * old + tl.load(at + G * (D + 1) + g, cache_modifier=".cg") * new
                largest = now
            tl.store(counters + row, 0)  # for the next launch
    else:
        last = True
    if last:
        y += (batch * HEADS + head) * SHARE * D
        # A row with nothing to attend to gives zeros.
        out = total / tl.where(weight == 0, 1.0, weight)[:, None]
        tl.store(y + g[:, None] * D + d[None, :], out.to(y.dtype.element_ty), mask=mine[:, None])
