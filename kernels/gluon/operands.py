# mypy: disable-error-code="no-untyped-def,assignment,misc"
"""Packed codes as the operand of Hopper's matrix instruction (wgmma) that comes from registers.

The words of a tile lie as the threads of four warps need them (`codes/tiles.py`): each thread reads 16 bytes and has
the codes of its part of a [64, KE] operand, of rows g and g + 8 of the warp's tile. Nothing is moved between threads,
and `assert_trivial` has the compiler say so.

A step takes 64 columns: four of a thread's words of 4 bits, two of 2 or 3 bits, eight of 8 bits.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def words_of(bits):
    """Of a thread in a step."""
    return {2: 2, 3: 2, 4: 4, 8: 8}[bits]


@gluon.constexpr_function
def _places(bits):
    """Of a word: registers of two weights each that it becomes."""
    return 16 // (2 if bits == 3 else bits)


@gluon.constexpr_function
def lanes_with(count):
    """[tile of 16 rows, g // 2, 4·(g % 2) + t, word], lane 4·g + t."""
    return gl.BlockedLayout([1, 1, 1, count], [1, 4, 8, 1], [4, 1, 1, 1], [3, 2, 1, 0])


@gluon.constexpr_function
def as_stored(count):
    """The same, as shared memory has them: `count` words of a thread beside each other, 32 in a row."""
    return gl.BlockedLayout([1, 1, count], [1, count, 32 // count], [4, 1, 1], [2, 1, 0])


@gluon.constexpr_function
def _codes(bits: int, float16: bool, word: int, place: int) -> list[str]:
    """Instructions that leave in t two codes of up to 4 bits, each in the low bits of the mantissa of 2^m: the number
    2^m + code (128 in bf16, 1024 in fp16)."""
    magic = "0x64006400" if float16 else "0x43004300"
    width = 2 if bits == 3 else bits  # in a word
    count = _places(bits)
    mask = f"0x{2**width - 1:04x}{2**width - 1:04x}"
    source, lines = f"${2 * count + word}", []
    if place:
        lines.append(f"shr.u32 t, {source}, {width * place};")
        source = "t"
    lines.append(f"lop3.b32 t, {source}, {mask}, {magic}, 0xea;")  # the truth table of (a & b) | c
    if bits == 3:  # the high bit goes to bit 2
        source, shift = f"${2 * count + 2 + word}", place + 8 * word - 2
        if shift:
            lines.append(f"{'shr.u32' if shift > 0 else 'shl.b32'} h, {source}, {abs(shift)};")
            source = "h"
        lines.append(f"lop3.b32 t, {source}, 0x00040004, t, 0xea;")
    return lines


@gluon.constexpr_function
def assembly(bits: int, float16: bool) -> str:
    """Two words to registers of two weights each. With code + 2^m in place of the code, which is to set a bit,
    (code + 2^m) − (zero + 2^m) is exact; then it is multiplied by the scale.

    128 + code of 8 bits would not be exact in bf16: those codes become fp32 numbers (m = 23), which are rounded at the
    end, so these weights are rounded once, others twice, as their scale is rounded to bf16 first.

    Operands: the results; 2 words; with 3 bits, 2 words of high bits (the same one twice); and, of row g and then of
    row g + 8, twice zero + 2^m and twice the scale."""
    kind = "f16x2" if float16 else "bf16x2"
    count = _places(bits)
    grid = 2 * count + (4 if bits == 3 else 2)
    lines = [".reg .b32 t, h;"]
    for word in range(2):
        for place in range(count):  # row_half + 2·k_half + …
            row_half, to, source = place & 1, f"${word * count + place}", f"${2 * count + word}"
            zero, scale = f"${grid + 2 * row_half + word}", f"${grid + 4 + 2 * row_half + word}"
            if bits == 8 and not float16:
                for register, byte in (("t", row_half), ("h", row_half + 2)):
                    lines.append(f"prmt.b32 {register}, {source}, 0x4b000000, 0x754{byte};")
                    lines.append(f"sub.f32 {register}, {register}, {zero};")
                    lines.append(f"mul.f32 {register}, {register}, {scale};")
                lines.append(f"cvt.rn.bf16x2.f32 {to}, h, t;")
                continue
            if bits == 8:  # each byte below the byte 0x64 of fp16's 1024
                lines.append(f"prmt.b32 t, {source}, 0x64646464, 0x{'4341' if row_half else '4240'};")
            else:
                lines += _codes(bits, float16, word, place)
            lines.append(f"sub.{kind} t, t, {zero};")
            lines.append(f"mul.{kind} {to}, t, {scale};")
    return "{" + " ".join(lines) + "}"


@gluon.constexpr_function
def constraints(bits):
    return ",".join(["=&r"] * (2 * _places(bits)) + ["r"] * (12 if bits == 3 else 10))


@gluon.constexpr_function
def results(bits, dtype):
    return (dtype,) * (2 * _places(bits))


@gluon.jit
def _join4(b0, b1, b2, b3):
    """Along two new last axes, [[0, 1], [2, 3]]."""
    return gl.join(gl.join(b0, b2), gl.join(b1, b3))


@gluon.jit
def _join8(b0, b1, b2, b3, b4, b5, b6, b7):
    return gl.join(_join4(b0, b2, b4, b6), _join4(b1, b3, b5, b7))


@gluon.jit
def weights(q, high, grid, BITS: gl.constexpr, TILES: gl.constexpr, OPERAND: gl.constexpr, DTYPE: gl.constexpr):
    """W [16·TILES, 64] from words int32 [TILES, 4, 8, words_of(BITS)], for 3 bits words of high bits [TILES, 4, 8], and
    their `grid`."""
    zero, zero_8, scale, scale_8 = grid
    ASSEMBLY: gl.constexpr = assembly(BITS, gl.float16 == DTYPE)
    CONSTRAINTS: gl.constexpr = constraints(BITS)
    RESULTS: gl.constexpr = results(BITS, DTYPE)
    if BITS == 3:
        of_both = gl.convert_layout(gl.join(high, high), q.type.layout, assert_trivial=True)
        parts = [q, of_both, zero, zero_8, scale, scale_8]
    else:
        parts = [q, zero, zero_8, scale, scale_8]
    b = gl.inline_asm_elementwise(ASSEMBLY, CONSTRAINTS, parts, RESULTS, is_pure=True, pack=2)
    # The compiler takes neighbouring words for the two halves of a register, which really are the two codes e of one.
    # The last axes, from the join, are a result's word and place; the axes below are those of `codes/tiles.py`.
    if BITS == 4:
        w = _join8(b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7])
        w = w.reshape([TILES, 8, 4, 2, 2, 2, 2, 2])  # g, t, step // 2, e, step % 2, k_half, row_half
    elif BITS == 8:
        w = _join4(b[0], b[1], b[2], b[3]).reshape([TILES, 8, 4, 2, 2, 2, 2, 2])  # … step // 2, step % 2, e, …
        w = w.permute([0, 1, 2, 3, 5, 4, 6, 7])
    else:
        even = _join8(b[0], b[2], b[4], b[6], b[8], b[10], b[12], b[14])
        odd = _join8(b[1], b[3], b[5], b[7], b[9], b[11], b[13], b[15])
        w = gl.join(even, odd).reshape([TILES, 8, 4, 2, 2, 2, 2, 2])  # g, t, e, step // 2, step % 2, k_half, row_half
        w = w.permute([0, 1, 2, 4, 3, 5, 6, 7])
    w = w.permute([0, 7, 1, 3, 5, 6, 2, 4]).reshape([16 * TILES, 64])
    return gl.convert_layout(w, OPERAND, assert_trivial=True)


@gluon.jit
def _grid(word, BITS: gl.constexpr, DTYPE: gl.constexpr):
    """Of a word of scale and zero point: zero + 2^m and the scale, each as a pair of 16-bit numbers, or as fp32."""
    z, s = word >> 16, word & 0xFFFF
    if gl.float16 == DTYPE:
        z |= 0x6400
    else:
        exact = s.to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)
        if BITS == 8:
            return z | 0x4B000000, exact.to(gl.int32, bitcast=True)
        z |= 0x4300
        s = exact.to(gl.bfloat16).to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF
    return z | (z << 16), s | (s << 16)


@gluon.jit
def _each(first, second, BITS: gl.constexpr, GROUP: gl.constexpr):
    """[TILES, 4, 8, 1], or with groups of 32 columns [TILES, 4, 8, words]: what belongs to each word of a step."""
    if GROUP == 32:
        COUNT: gl.constexpr = words_of(BITS)
        each = gl.join(first, second)
        if BITS == 4 or BITS == 8:
            each = gl.join(each, each)
        if BITS == 8:
            each = gl.join(each, each)
        each = gl.convert_layout(each.reshape([first.shape[0], 4, 8, COUNT]), lanes_with(COUNT), assert_trivial=True)
    else:
        each = first.expand_dims(3)
    return each


@gluon.jit
def grid_words(
    scale_zero, row_tile, row_tiles, groups, step, BITS: gl.constexpr, GROUP: gl.constexpr, TILES: gl.constexpr
):
    """The words of scale and zero point for 64 columns: of row g and of row g + 8; with groups of 32 columns, also
    those of the second group."""
    LANES: gl.constexpr = gl.SliceLayout(3, lanes_with(words_of(BITS)))
    HALVES: gl.constexpr = gl.SliceLayout(2, LANES)
    tile = gl.arange(0, TILES, layout=gl.SliceLayout(1, HALVES)).expand_dims(1).expand_dims(2)
    tile = gl.minimum(row_tile + tile, row_tiles - 1)
    j = gl.arange(0, 4, layout=gl.SliceLayout(0, HALVES)).expand_dims(0).expand_dims(2)
    c = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, LANES))).expand_dims(0).expand_dims(1)
    if GROUP == 0:
        group = step * 0
    elif GROUP >= 64:
        group = step // (GROUP // 64)
    else:
        group = step * (64 // GROUP)
    group = gl.minimum(group, groups - 1)
    at = scale_zero + (tile * groups + group) * 16 + 2 * j + c // 4
    if GROUP == 32:
        then = at + gl.where(group + 1 < groups, 16, 0)
        words = (gl.load(at), gl.load(at + 8), gl.load(then), gl.load(then + 8))
    else:
        words = (gl.load(at), gl.load(at + 8))
    return words


@gluon.jit
def grid_of(words, BITS: gl.constexpr, GROUP: gl.constexpr, DTYPE: gl.constexpr):
    """What `weights` takes."""
    z, s = _grid(words[0], BITS, DTYPE)
    z_8, s_8 = _grid(words[1], BITS, DTYPE)
    if GROUP == 32:
        y, r = _grid(words[2], BITS, DTYPE)
        y_8, r_8 = _grid(words[3], BITS, DTYPE)
    else:
        y, r, y_8, r_8 = z, s, z_8, s_8
    return (
        _each(z, y, BITS, GROUP),
        _each(z_8, y_8, BITS, GROUP),
        _each(s, r, BITS, GROUP),
        _each(s_8, r_8, BITS, GROUP),
    )
