# mypy: disable-error-code="no-untyped-def,assignment,misc"
"""Packed codes as the operand of Hopper's matrix instruction (wgmma) that comes from registers.

The words of a tile lie as the threads of four warps need them (`codes/tiles.py`): each thread reads 16 bytes and has
the codes of its part of a [64, 64] operand, of rows g and g + 8 of the warp's tile. Nothing is moved between threads,
and `assert_trivial` has the compiler say so.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# [tile of 16 rows, g // 2, 4·(g % 2) + t, word], lane 4·g + t.
WORDS = gl.constexpr(gl.BlockedLayout([1, 1, 1, 4], [1, 4, 8, 1], [4, 1, 1, 1], [3, 2, 1, 0]))
LANES = gl.constexpr(gl.SliceLayout(3, WORDS))
_HALVES = gl.constexpr(gl.SliceLayout(2, LANES))
STORED = gl.constexpr(gl.BlockedLayout([1, 1, 4], [1, 4, 8], [4, 1, 1], [2, 1, 0]))  # the same, as shared memory has it


def _assembly(float16: bool) -> str:
    """Two words to eight registers of two weights each. With code + 2^m in place of the code, which is to set a bit,
    (code + 2^m) − (zero + 2^m) is exact; then it is multiplied by the scale.

    Operands: 8 results; 2 words; and, of row g and then of row g + 8, twice zero + 2^m and twice the scale."""
    magic, kind = ("0x64006400", "f16x2") if float16 else ("0x43004300", "bf16x2")
    lines = [".reg .b32 t;"]
    for word in range(2):
        for place in range(4):  # row_half + 2·k_half
            source, row_half = f"${8 + word}", place & 1
            if place:
                lines.append(f"shr.u32 t, {source}, {4 * place};")
                source = "t"
            lines.append(f"lop3.b32 t, {source}, 0x000f000f, {magic}, 0xea;")
            lines.append(f"sub.{kind} t, t, ${10 + 2 * row_half + word};")
            lines.append(f"mul.{kind} ${word * 4 + place}, t, ${14 + 2 * row_half + word};")
    return "{" + " ".join(lines) + "}"


BF16 = gl.constexpr(_assembly(float16=False))
FP16 = gl.constexpr(_assembly(float16=True))
CONSTRAINTS = gl.constexpr(",".join(["=&r"] * 8 + ["r"] * 10))


@gluon.jit
def weights(q, grid, TILES: gl.constexpr, OPERAND: gl.constexpr, DTYPE: gl.constexpr):
    """W [16·TILES, 64] from words int32 [TILES, 4, 8, 4] and their `grid`."""
    zero, zero_8, scale, scale_8 = grid
    parts = [q, zero, zero_8, scale, scale_8]
    if gl.float16 == DTYPE:
        b = gl.inline_asm_elementwise(FP16, CONSTRAINTS, parts, (gl.float16,) * 8, is_pure=True, pack=2)
    else:
        b = gl.inline_asm_elementwise(BF16, CONSTRAINTS, parts, (gl.bfloat16,) * 8, is_pure=True, pack=2)
    # The compiler takes neighbouring words for the two halves of a register, which really are the two codes e of one.
    even = gl.join(gl.join(b[0], b[4]), gl.join(b[2], b[6]))
    odd = gl.join(gl.join(b[1], b[5]), gl.join(b[3], b[7]))
    w = gl.join(even, odd).reshape([TILES, 8, 4, 2, 2, 2, 2, 2])  # g, t, step // 2, e, step % 2, k_half, row_half
    w = w.permute([0, 7, 1, 3, 5, 6, 2, 4]).reshape([16 * TILES, 64])
    return gl.convert_layout(w, OPERAND, assert_trivial=True)


@gluon.jit
def _twice(word, DTYPE: gl.constexpr):
    """Of a word of scale and zero point: zero + 2^m and the scale, each as a pair of 16-bit numbers."""
    s = word & 0xFFFF
    if gl.float16 == DTYPE:
        z = (word >> 16) | 0x6400
    else:
        z = (word >> 16) | 0x4300
        s = s.to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32).to(gl.bfloat16)
        s = s.to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF
    return z | (z << 16), s | (s << 16)


@gluon.jit
def _each(first, second, GROUP: gl.constexpr):
    """[TILES, 4, 8, 1], or with groups of 32 columns [TILES, 4, 8, 4]: what belongs to each of the four words."""
    if GROUP == 32:
        both = gl.join(first, second)
        both = gl.join(both, both)
        each = gl.convert_layout(both.reshape([first.shape[0], 4, 8, 4]), WORDS, assert_trivial=True)
    else:
        each = first.expand_dims(3)
    return each


@gluon.jit
def grid_words(scale_zero, row_tile, row_tiles, groups, step, GROUP: gl.constexpr, TILES: gl.constexpr):
    """The words of scale and zero point for 64 columns: of row g and of row g + 8; with groups of 32 columns, also
    those of the second group."""
    tile = gl.arange(0, TILES, layout=gl.SliceLayout(1, _HALVES)).expand_dims(1).expand_dims(2)
    tile = gl.minimum(row_tile + tile, row_tiles - 1)
    j = gl.arange(0, 4, layout=gl.SliceLayout(0, _HALVES)).expand_dims(0).expand_dims(2)
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
def grid_of(words, GROUP: gl.constexpr, DTYPE: gl.constexpr):
    """What `weights` takes."""
    z, s = _twice(words[0], DTYPE)
    z_8, s_8 = _twice(words[1], DTYPE)
    if GROUP == 32:
        y, r = _twice(words[2], DTYPE)
        y_8, r_8 = _twice(words[3], DTYPE)
        grid = (_each(z, y, GROUP), _each(z_8, y_8, GROUP), _each(s, r, GROUP), _each(s_8, r_8, GROUP))
    else:
        grid = (_each(z, z, GROUP), _each(z_8, z_8, GROUP), _each(s, s, GROUP), _each(s_8, s_8, GROUP))
    return grid
