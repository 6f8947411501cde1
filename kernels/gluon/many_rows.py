# mypy: disable-error-code="no-untyped-def,assignment,misc"
"""x·Wᵀ for many rows of x on Hopper, with a packed W: tensor cores that run on while codes are unpacked.

The roles are exchanged, yᵀ = W·xᵀ: what is unpacked goes from registers into wgmma, xᵀ comes from shared memory, where
the copy engine (TMA) puts it. It also puts codes there, many steps of 64 columns ahead; it reads zeros beyond the ends
of x and W, and leaves out what is beyond the end of y.

A program has two groups of four warps, which share a tile's rows of x, and each has 64 rows of W. A group has one
product on its way while it unpacks what the next one needs, into other registers: wgmma reads its operand until it is
done. The second group is also the one that asks for copies. (A group for that alone would make twelve warps, of which
ptxas gives each so few registers that products have to wait for each other.)

Where there are few tiles, K is divided among SPLIT programs. The last one to come adds up all their sums, in the order
of their parts, whichever it is. No program waits for another, so nothing depends on which of them run at a time.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from gptq_ao.kernels.gluon.operands import as_stored, grid_of, grid_words, lanes_with, weights, words_of

__all__ = ["STEP", "many_rows_kernel"]

# Under the names that they have from Triton 3.8 and 3.7 on, or else under those of 3.6.
_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # of the warps of one group

STEP = gl.constexpr(64)  # columns
# fp32 sums in the order in which threads have them: each 16 bytes, a warp 512.
SUMS = gl.constexpr(gl.BlockedLayout([1, 1, 4], [1, 32, 1], [1, 4, 1], [2, 1, 0]))


@gluon.jit
def _piece(w, tiles_m, last_m, steps, BN: gl.constexpr, BM: gl.constexpr, SPLIT: gl.constexpr):
    """Of a program's piece of work: its first row of x, row of tiles of W, first step and the end of its steps. Parts
    begin at an even step, as steps are taken by twos.

    The last tile of x begins where it ends with x, so some rows are in two tiles, which find the same for them: rows
    beyond the end, filled with zeros, take the copy engine longer than others."""
    tile = w // SPLIT
    part = w % SPLIT
    pairs = (steps + 1) // 2
    row = tile // tiles_m * (BN // 16)
    return min(tile % tiles_m * BM, last_m), row, part * pairs // SPLIT * 2, (part + 1) * pairs // SPLIT * 2


@gluon.jit
def _ask(
    x_desc, w_desc, h_desc, xs, ws, hs, full, s, m, row, step, wanted,
    BITS: gl.constexpr, BN: gl.constexpr, BM: gl.constexpr, AT_ONCE: gl.constexpr,
):  # fmt: skip
    """For the copies of a stage. Beyond the last column there are zeros, and as many bytes."""
    bar = full.index(s)
    mbarrier.expect(bar, AT_ONCE * (BM * STEP * 2 + BN * STEP * BITS // 8), pred=wanted)
    for i in gl.static_range(AT_ONCE):
        _load(x_desc, [m, (step + i) * STEP], bar, xs.index(s * AT_ONCE + i), pred=wanted)
    for g in gl.static_range(2):
        _load(w_desc, [row + g * (BN // 32), step * words_of(BITS), 0], bar, ws.index(s * 2 + g), pred=wanted)
        if BITS == 3:
            _load(h_desc, [row + g * (BN // 32), step, 0], bar, hs.index(s * 2 + g), pred=wanted)


@gluon.jit
def _next(
    w, m, row, step, end, work, tiles_m, last_m, steps,
    BN: gl.constexpr, BM: gl.constexpr, SPLIT: gl.constexpr, AT_ONCE: gl.constexpr,
):  # fmt: skip
    """Where the steps after these are, maybe in this program's next piece of work."""
    step += AT_ONCE
    if step == end:
        w += gl.num_programs(0)
        if w < work:
            m, row, step, end = _piece(w, tiles_m, last_m, steps, BN, BM, SPLIT)
    return w, m, row, step, end


@gluon.jit
def _release(
    LEADER: gl.constexpr, x_desc, w_desc, h_desc, xs, ws, hs, full, empty, s, phase, w, m, row, step, end,
    work, tiles_m, last_m, steps, BITS: gl.constexpr, BN: gl.constexpr, BM: gl.constexpr, SPLIT: gl.constexpr,
    AT_ONCE: gl.constexpr,
):  # fmt: skip
    """A group is done with stage s. The leader waits for the other one, fills the stage again, and goes on to what it
    asks for next."""
    if LEADER:
        mbarrier.wait(empty.index(s), phase)
        _ask(x_desc, w_desc, h_desc, xs, ws, hs, full, s, m, row, step, w < work, BITS, BN, BM, AT_ONCE)
        w, m, row, step, end = _next(w, m, row, step, end, work, tiles_m, last_m, steps, BN, BM, SPLIT, AT_ONCE)
    else:
        mbarrier.arrive(empty.index(s))
    return w, m, row, step, end


@gluon.jit
def _put(chunk, y_desc, ys, bias, m, n, rows, LAYOUT: gl.constexpr, DTYPE: gl.constexpr):
    """chunk [64, C] fp32 and the bias to y [m : m + C, n : n + 64], through shared memory."""
    chunk = gl.convert_layout(chunk, LAYOUT, assert_trivial=True)
    if bias is not None:
        at = n + gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
        chunk += gl.load(bias + at, mask=at < rows, other=0.0).to(gl.float32).expand_dims(1)
    tma.store_wait(0)  # what was stored from there before has been read
    _barrier()
    ys.permute((1, 0)).store(chunk.to(DTYPE))
    fence_async_shared()
    _barrier()
    _store(y_desc, [m, n], ys)


@gluon.jit
def _put_all(
    acc, y_desc, ys, bias, m, n, rows, C: gl.constexpr, EC: gl.constexpr, LAYOUT: gl.constexpr, DTYPE: gl.constexpr
):
    """acc [64, C], EC columns at a time: the compiler only gives registers other names."""
    if C == EC:
        _put(acc, y_desc, ys, bias, m, n, rows, LAYOUT, DTYPE)
    else:
        a, b = acc.reshape([64, 2, C // 2]).permute([0, 2, 1]).split()
        _put_all(a, y_desc, ys, bias, m, n, rows, C // 2, EC, LAYOUT, DTYPE)
        _put_all(b, y_desc, ys, bias, m + C // 2, n, rows, C // 2, EC, LAYOUT, DTYPE)


@gluon.jit
def _places(sums, COUNT: gl.constexpr):
    a = gl.arange(0, COUNT, layout=gl.SliceLayout(1, gl.SliceLayout(2, SUMS))).expand_dims(1).expand_dims(2)
    b = gl.arange(0, 128, layout=gl.SliceLayout(0, gl.SliceLayout(2, SUMS))).expand_dims(0).expand_dims(2)
    c = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, SUMS))).expand_dims(0).expand_dims(1)
    return sums + (a * 512 + b * 4 + c)


@gluon.jit
def _leave(acc, sums, C: gl.constexpr):
    """acc [64, C] to memory, without moving anything between threads."""
    v = acc.reshape([4, 2, 8, C // 8, 4, 2]).permute([3, 0, 2, 4, 1, 5]).reshape([C // 8, 128, 4])
    gl.store(_places(sums, C // 8), gl.convert_layout(v, SUMS, assert_trivial=True))


@gluon.jit
def _left(sums, apart, C: gl.constexpr, SPLIT: gl.constexpr):
    """[64, C]: what SPLIT programs have left, `apart` from each other, added up."""
    at = _places(sums, C // 8)
    total = gl.load(at, cache_modifier=".cg")
    for p in gl.static_range(1, SPLIT):
        total += gl.load(at + p * apart, cache_modifier=".cg")
    return total.reshape([C // 8, 4, 8, 4, 2, 2]).permute([1, 4, 2, 0, 3, 5]).reshape([64, C])


@gluon.jit
def _group(
    GROUP_OF_WARPS: gl.constexpr, scale_zero, bias, partial, counters,
    x_desc, w_desc, h_desc, y_desc, xs, ws, hs, full, empty, ys, work, tiles_m, last_m, steps, groups, rows,
    BITS: gl.constexpr, GROUP: gl.constexpr, BN: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr,
    EC: gl.constexpr, SPLIT: gl.constexpr, AT_ONCE: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """What one group of warps does."""
    LEADER: gl.constexpr = GROUP_OF_WARPS == 1
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    CHUNK: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, EC, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, LAYOUT, 2)
    SIZE: gl.constexpr = 64 * BM
    ONE_GRID: gl.constexpr = GROUP == 0 or GROUP >= 128  # for the two steps
    # Of 2 and 3 bits, the 16 bytes of a thread are two steps; of 4 bits one, of 8 bits half a step.
    COUNT: gl.constexpr = words_of(BITS)
    WORDS: gl.constexpr = lanes_with(COUNT)
    READ: gl.constexpr = as_stored(4)
    row_tiles = (rows + 15) // 16
    # What the leader asks for next; it is STAGES steps ahead.
    lw = gl.program_id(0)
    lm, lrow, lstep, lend = _piece(lw, tiles_m, last_m, steps, BN, BM, SPLIT)
    if LEADER:
        for i in range(STAGES):
            _ask(x_desc, w_desc, h_desc, xs, ws, hs, full, i, lm, lrow, lstep, lw < work, BITS, BN, BM, AT_ONCE)
            lw, lm, lrow, lstep, lend = _next(
                lw, lm, lrow, lstep, lend, work, tiles_m, last_m, steps, BN, BM, SPLIT, AT_ONCE
            )
    s = 0  # the stage, and the parity of its barriers
    phase = 0
    before = 0  # those of the step before
    before_phase = 0
    w = gl.program_id(0)
    while w < work:
        m, row, first, end = _piece(w, tiles_m, last_m, steps, BN, BM, SPLIT)
        row += GROUP_OF_WARPS * 4
        acc = gl.zeros([64, BM], gl.float32, LAYOUT)
        last = end - 1
        words_0 = grid_words(scale_zero, row, row_tiles, groups, first, BITS, GROUP, 4)
        words_1 = words_0 if ONE_GRID else grid_words(scale_zero, row, row_tiles, groups, first + 1, BITS, GROUP, 4)
        # max: the compiler must know that the loop runs once. Else there is a way on which the sums are set to zero
        # just before they are waited for, and ptxas makes all products wait for each other (its remark C7515).
        for pair in range(gl.maximum((end - first) // 2, 1)):
            grid = grid_of(words_0, BITS, GROUP, DTYPE)
            then = first + 2 * pair + 2  # its grids are read from memory two steps ahead
            words_0 = grid_words(scale_zero, row, row_tiles, groups, gl.minimum(then, last), BITS, GROUP, 4)
            for half in gl.static_range(2):
                if half == 1 and not ONE_GRID:
                    grid = grid_of(words_1, BITS, GROUP, DTYPE)
                    words_1 = grid_words(scale_zero, row, row_tiles, groups, gl.minimum(then + 1, last), BITS, GROUP, 4)
                if half == 0 or AT_ONCE == 1:
                    mbarrier.wait(full.index(s), phase)
                    q = ws.index(s * 2 + GROUP_OF_WARPS).load(READ)
                    if BITS < 4:
                        q = q.reshape([4, 4, 8, AT_ONCE, COUNT]).permute([0, 1, 2, 4, 3])
                    else:
                        q = q.reshape([4, AT_ONCE, COUNT // 4, 4, 8, 4]).permute([0, 3, 4, 2, 5, 1])
                        q = q.reshape([4, 4, 8, COUNT, AT_ONCE])
                    if AT_ONCE == 2:
                        words, second = q.split()
                    else:
                        words = q.reshape([4, 4, 8, COUNT])
                    if BITS == 3:
                        high, high_second = (
                            hs.index(s * 2 + GROUP_OF_WARPS).load(as_stored(2)).reshape([4, 4, 8, 2]).split()
                        )
                else:
                    words = second
                    if BITS == 3:
                        high = high_second
                words = gl.convert_layout(words, WORDS, assert_trivial=True)
                a = weights(words, high if BITS == 3 else None, grid, BITS, 4, OPERAND, DTYPE)
                place = s if AT_ONCE == 1 else 2 * s + half
                acc = warpgroup_mma(a, xs.index(place).permute((1, 0)), acc, is_async=True)
                acc = warpgroup_mma_wait(num_outstanding=1, deps=[acc])
                # The step before is done. If that was the last of its stage, and there was one, that is free.
                if (half == 1 and AT_ONCE == 1) or (half == 0 and pair > 0):
                    lw, lm, lrow, lstep, lend = _release(
                        LEADER, x_desc, w_desc, h_desc, xs, ws, hs, full, empty, before, before_phase,
                        lw, lm, lrow, lstep, lend, work, tiles_m, last_m, steps, BITS, BN, BM, SPLIT, AT_ONCE,
                    )  # fmt: skip
                if half == 1 or AT_ONCE == 1:
                    before = s
                    before_phase = phase
                    s += 1
                    if s == STAGES:
                        s = 0
                        phase ^= 1
        acc = warpgroup_mma_wait(num_outstanding=0, deps=[acc])
        lw, lm, lrow, lstep, lend = _release(
            LEADER, x_desc, w_desc, h_desc, xs, ws, hs, full, empty, before, before_phase, lw, lm, lrow, lstep, lend,
            work, tiles_m, last_m, steps, BITS, BN, BM, SPLIT, AT_ONCE,
        )  # fmt: skip

        if SPLIT == 1:
            _put_all(acc, y_desc, ys.index(GROUP_OF_WARPS), bias, m, row * 16, rows, BM, EC, CHUNK, DTYPE)
        else:
            _leave(acc, partial + (w * 2 + GROUP_OF_WARPS) * SIZE, BM)
            _barrier()
            counter = counters + w // SPLIT * 2 + GROUP_OF_WARPS
            if gl.atomic_add(counter, 1, sem="acq_rel") == SPLIT - 1:
                gl.store(counter, 0)
                sums = partial + (w // SPLIT * SPLIT * 2 + GROUP_OF_WARPS) * SIZE
                for c in range(BM // EC):
                    total = _left(sums + c * (EC * 64), 2 * SIZE, EC, SPLIT)
                    _put(total, y_desc, ys.index(GROUP_OF_WARPS), bias, m + c * EC, row * 16, rows, CHUNK, DTYPE)
        w += gl.num_programs(0)
    tma.store_wait(0)


@gluon.jit
def _to_cache(start, row, row_tiles, length, first, bytes, COUNT: gl.constexpr):
    """Of each of COUNT rows of tiles, `length` bytes apart, `bytes` from `first` on to the L2 cache."""
    i = gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0]))
    address = start.to(gl.int64) + (gl.minimum(row + i, row_tiles - 1).to(gl.int64) * length + first)
    size = gl.where(i < COUNT, bytes, 0)
    gl.inline_asm_elementwise(
        "{.reg .pred p; setp.gt.s32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0;}",
        "=r,l,r", [address, size], gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit(do_not_specialize=["work", "tiles_m", "last_m", "tiles_k", "groups", "rows"])
def many_rows_kernel(
    qdata, scale_zero, bias, partial, counters, x_desc, w_desc, h_desc, y_desc,
    work, tiles_m, last_m, tiles_k, groups, rows,
    BITS: gl.constexpr, GROUP: gl.constexpr, BN: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr, EC: gl.constexpr,
    SPLIT: gl.constexpr, AT_ONCE: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """y [M, N] = x [M, K]·Wᵀ, and a bias [N] or None.

    Args:
        qdata, scale_zero: see `codes/tiles.py`.
        partial: fp32 [work·BN·BM], counters: int32 [2·work / SPLIT] of zeros, left as such; None without a split.
        x_desc: boxes [BM, 64] of x; w_desc: [BN/32, words, 32] of qdata as [N/16, 4·K/KE, 32], with the words that a
            lane has in a stage; h_desc: [BN/32, 2, 32] of the high bits as [N/16, K/64, 32], None but for 3 bits;
            y_desc: [EC, 64] of y. All with swizzles of 128 bytes.
        work: tiles of y, times SPLIT. tiles_m: tiles along M. last_m: where the last of them begins. tiles_k: K / KE.
        groups: of a row. rows: N.
        GROUP: columns that share a scale: 32, 64, multiples of 128, or 0: all.
        AT_ONCE: steps of a stage, one or two (with 2 and 3 bits): what is asked for and waited for together.
    """
    steps = (tiles_k * 4 + words_of(BITS) - 1) // words_of(BITS)
    xs = gl.allocate_shared_memory(DTYPE, [STAGES * AT_ONCE, BM, STEP], x_desc.layout)
    ws = gl.allocate_shared_memory(gl.int32, [STAGES * 2, BN // 32, words_of(BITS) * AT_ONCE, 32], w_desc.layout)
    hs = gl.allocate_shared_memory(gl.int32, [STAGES * 2, BN // 32, 2, 32], h_desc.layout) if BITS == 3 else ws
    ys = gl.allocate_shared_memory(DTYPE, [2, EC, 64], y_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    # While the kernel before still runs. Safe, though that may write the weight: the L2 cache is where it writes.
    _, row, first, end = _piece(gl.program_id(0), tiles_m, last_m, steps, BN, BM, SPLIT)
    row_tiles = (rows + 15) // 16
    begin = first * (words_of(BITS) * 128)  # in bytes
    wanted = gl.minimum(end - first, 2 * STAGES * AT_ONCE) * (words_of(BITS) * 128)
    _to_cache(qdata, row, row_tiles, tiles_k * 512, begin, gl.minimum(wanted, tiles_k * 512 - begin), BN // 16)
    # Programmatic launch: the kernel before is done from here on, and the next one may be placed.
    gl.inline_asm_elementwise(
        "griddepcontrol.wait; griddepcontrol.launch_dependents; mov.b32 $0, 0;",
        "=r",
        [],
        gl.int32,
        is_pure=False,
        pack=1,
    )
    gl.warp_specialize([
        (_group, (0, scale_zero, bias, partial, counters, x_desc, w_desc, h_desc, y_desc, xs, ws, hs, full, empty, ys,
                  work, tiles_m, last_m, steps, groups, rows,
                  BITS, GROUP, BN, BM, STAGES, EC, SPLIT, AT_ONCE, DTYPE)),
        (_group, (1, scale_zero, bias, partial, counters, x_desc, w_desc, h_desc, y_desc, xs, ws, hs, full, empty, ys,
                  work, tiles_m, last_m, steps, groups, rows,
                  BITS, GROUP, BN, BM, STAGES, EC, SPLIT, AT_ONCE, DTYPE)),
    ], [4], [248])  # fmt: skip
