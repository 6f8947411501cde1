# mypy: disable-error-code="no-untyped-def"
"""From packed words to numbers, in registers: the layout of `codes/tiles.py` read by Triton kernels.

A lane holds whole words of its own matrix-instruction fragment, so nothing moves between lanes: what looks like
reshapes and permutations here gives names to registers.

Two ways to the same numbers. With `FAST`, a pair of codes (e = 0, 1; see `codes/tiles.py`) is cut out of a word by one
instruction, (word >> shift) & mask | magic, that puts each code into the low bits of the mantissa of a large number:
of 128 in bf16, 1024 in fp16, 2^23 in fp32, so that the result is that number plus the code, exactly. (Kim et al., "Who
Says Elephants Can't Run", 2022.) Otherwise shift, mask and convert code by code, which Triton's interpreter can do too.
"""

import triton
import triton.language as tl

__all__ = ["unpack"]


def _pairs(bits: int, magic: str) -> str:
    """Two words of 2- or 4-bit codes to 2·(16 / bits) registers of two 16-bit numbers."""
    places, mask = 16 // bits, f"0x{2**bits - 1:04x}{2**bits - 1:04x}"
    lines = [".reg .b32 t;"]
    for word in range(2):
        for place in range(places):
            source = f"${2 * places + word}"
            if place:
                lines.append(f"shr.u32 t, {source}, {bits * place};")
                source = "t"
            # 0xea is the truth table of (a & b) | c.
            lines.append(f"lop3.b32 ${word * places + place}, {source}, {mask}, {magic}, 0xea;")
    return "{" + " ".join(lines) + "}"


def _pairs_of_three(magic: str) -> str:
    """Two words of low bits and (twice) the word of their high bits to 16 registers of two 16-bit numbers."""
    lines = [".reg .b32 t, low, h;"]
    for word in range(2):
        for place in range(8):
            source, high = f"${16 + word}", f"${18 + word}"
            if place:
                lines.append(f"shr.u32 t, {source}, {2 * place};")
                source = "t"
            lines.append(f"lop3.b32 low, {source}, 0x00030003, {magic}, 0xea;")
            shift = place + 8 * word - 2  # the high bit goes to bit 2
            if shift:
                lines.append(f"{'shr.u32' if shift > 0 else 'shl.b32'} h, {high}, {abs(shift)};")
                high = "h"
            lines.append(f"lop3.b32 ${word * 8 + place}, {high}, 0x00040004, low, 0xea;")
    return "{" + " ".join(lines) + "}"


# Bytes 0 and 2 (or 1 and 3) of a word, each below the byte 0x64 of fp16's 1024.
_BYTES_FP16 = (
    "{"
    + " ".join(
        # In a selector of prmt, digits from the right: 0 to 3 are bytes of the word, 4 to 7 those of the constant.
        f"prmt.b32 ${2 * word + half}, ${4 + word}, 0x64646464, 0x{4341 if half else 4240};"
        for word in range(2)
        for half in range(2)
    )
    + "}"
)
# Each byte below the bytes of fp32's 2^23. 128 + code would not be exact in bf16.
_BYTES_FP32 = "{" + " ".join(f"prmt.b32 ${byte}, $4, 0x4b000000, 0x754{byte};" for byte in range(4)) + "}"

# 128 in bf16 and 1024 in fp16, in both halves of a register.
_BF16, _FP16 = "0x43004300", "0x64006400"
_ASM_2_BF16 = tl.constexpr(_pairs(2, _BF16))
_ASM_2_FP16 = tl.constexpr(_pairs(2, _FP16))
_ASM_3_BF16 = tl.constexpr(_pairs_of_three(_BF16))
_ASM_3_FP16 = tl.constexpr(_pairs_of_three(_FP16))
_ASM_4_BF16 = tl.constexpr(_pairs(4, _BF16))
_ASM_4_FP16 = tl.constexpr(_pairs(4, _FP16))
_ASM_8_FP16 = tl.constexpr(_BYTES_FP16)
_ASM_8_FP32 = tl.constexpr(_BYTES_FP32)
# "=&r": an output register must not be that of an input which is still to be read.
_INTO_4_FROM_1 = tl.constexpr(",".join(["=&r"] * 4 + ["r"]))
_INTO_4_FROM_2 = tl.constexpr(",".join(["=&r"] * 4 + ["r"] * 2))
_INTO_8_FROM_2 = tl.constexpr(",".join(["=&r"] * 8 + ["r"] * 2))
_INTO_16_FROM_2 = tl.constexpr(",".join(["=&r"] * 16 + ["r"] * 2))
_INTO_16_FROM_4 = tl.constexpr(",".join(["=&r"] * 16 + ["r"] * 4))


@triton.jit
def _join4(b):
    """b[2·i + j] along two new last axes (i, j)."""
    return tl.join(tl.join(b[0], b[2]), tl.join(b[1], b[3]))


@triton.jit
def _join8(b):
    return tl.join(_join4((b[0], b[2], b[4], b[6])), _join4((b[1], b[3], b[5], b[7])))


@triton.jit
def _join16(b):
    even = _join8((b[0], b[2], b[4], b[6], b[8], b[10], b[12], b[14]))
    return tl.join(even, _join8((b[1], b[3], b[5], b[7], b[9], b[11], b[13], b[15])))


@triton.jit
def _unpack_fast(q, high, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr):
    """_offset + code: [A, B, C, g, t, step (as three factors), k_half, e, row_half]."""
    FP16: tl.constexpr = dtype == tl.float16
    if BITS == 8 and FP16:
        b = tl.inline_asm_elementwise(_ASM_8_FP16, _INTO_4_FROM_2, [q], (tl.float16,) * 4, is_pure=True, pack=2)
        w = _join4(b).reshape(A, B, C, 8, 4, 1, 1, 2, 2, 2, 2)  # … step e | k_half row_half
        w = w.permute(0, 1, 2, 3, 4, 5, 6, 7, 9, 8, 10)
    elif BITS == 8:
        b = tl.inline_asm_elementwise(_ASM_8_FP32, _INTO_4_FROM_1, [q], (tl.float32,) * 4, is_pure=True, pack=1)
        w = _join4(b).reshape(A, B, C, 8, 4, 1, 1, 2, 2, 2, 2)  # … step k_half | e row_half
    elif BITS == 4:
        if FP16:
            b = tl.inline_asm_elementwise(_ASM_4_FP16, _INTO_8_FROM_2, [q], (tl.float16,) * 8, is_pure=True, pack=2)
        else:
            b = tl.inline_asm_elementwise(_ASM_4_BF16, _INTO_8_FROM_2, [q], (tl.bfloat16,) * 8, is_pure=True, pack=2)
        w = _join8(b).reshape(A, B, C, 8, 4, 1, 2, 2, 2, 2, 2)  # … step e | step k_half row_half
        w = w.permute(0, 1, 2, 3, 4, 5, 6, 8, 9, 7, 10)
    else:
        if BITS == 3:
            # Two words at a time of each operand, but two words of codes have one word of high bits.
            both = [q, tl.join(high, high).reshape(q.shape)]
            if FP16:
                b = tl.inline_asm_elementwise(
                    _ASM_3_FP16, _INTO_16_FROM_4, both, (tl.float16,) * 16, is_pure=True, pack=2
                )
            else:
                b = tl.inline_asm_elementwise(
                    _ASM_3_BF16, _INTO_16_FROM_4, both, (tl.bfloat16,) * 16, is_pure=True, pack=2
                )
        elif FP16:
            b = tl.inline_asm_elementwise(_ASM_2_FP16, _INTO_16_FROM_2, [q], (tl.float16,) * 16, is_pure=True, pack=2)
        else:
            b = tl.inline_asm_elementwise(_ASM_2_BF16, _INTO_16_FROM_2, [q], (tl.bfloat16,) * 16, is_pure=True, pack=2)
        w = _join16(b).reshape(A, B, C, 8, 4, 2, 2, 2, 2, 2, 2)  # … step e | step step k_half row_half
        w = w.permute(0, 1, 2, 3, 4, 5, 7, 8, 9, 6, 10)
    return w


@triton.jit
def _unpack_plain(q, high, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, BITS: tl.constexpr):
    """Codes as fp32: [A, B, C, g, t, step (as three factors), k_half, e, row_half]."""
    LOW: tl.constexpr = 2 if BITS == 3 else BITS
    codes = (q[:, :, None] >> (LOW * tl.arange(0, 32 // LOW))[None, None, :]) & (2**LOW - 1)
    if BITS == 8:
        codes = codes.reshape(A, B, C, 8, 4, 1, 1, 2, 2, 2, 2)
    elif BITS == 4:
        codes = codes.reshape(A, B, C, 8, 4, 1, 2, 2, 2, 2, 2).permute(0, 1, 2, 3, 4, 5, 6, 7, 9, 8, 10)
    else:
        codes = codes.reshape(A, B, C, 8, 4, 2, 2, 2, 2, 2, 2).permute(0, 1, 2, 3, 4, 5, 6, 8, 9, 7, 10)
        if BITS == 3:
            bit = (high[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1  # … word | e step step k_half row_half
            bit = bit.reshape(A, B, C, 8, 4, 2, 2, 2, 2, 2, 2).permute(0, 1, 2, 3, 4, 5, 7, 8, 9, 6, 10)
            codes = codes | (bit << 2)
    return codes.to(tl.float32)


@triton.jit
def unpack(
    q,
    high,
    zero,
    A: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
    BITS: tl.constexpr,
    FAST: tl.constexpr,
    NATURAL: tl.constexpr,
    dtype: tl.constexpr,
):
    """code − zero, exact, in `dtype`.

    Args:
        q: words [A·B, C·128] of A·C rows by B columns of tiles. high: for 3 bits, [A·B, C·64].
        zero: int32 [C·A·16, groups]; groups divide the columns evenly.
        FAST: see above.
        NATURAL: columns in order. Otherwise 2·t, 2·t + 1, 2·t + 8 and 2·t + 9 of each 16 are neighbours, which is how
            Triton wants to have an operand of mma.sync that was made in registers.

    Returns:
        [C·A·16, groups, B·KE / groups]
    """
    KE: tl.constexpr = 128 if BITS < 4 else 256 // BITS
    if FAST:
        w = _unpack_fast(q, high, A, B, C, BITS, dtype)
        # What `_unpack_fast` leaves on the codes goes away with the zero point.
        zero = zero + (1024 if dtype == tl.float16 else 8388608 if BITS == 8 else 128)
    else:
        w = _unpack_plain(q, high, A, B, C, BITS)
    # Rows are C, A, row_half, g. Columns are B, step, and then k_half, t, e if natural, else t, k_half, e.
    OUTER: tl.constexpr = 8 if NATURAL else 4
    w = w.permute(2, 0, 10, 3, 1, 5, 6, 7, OUTER, 12 - OUTER, 9)
    w = w.reshape(C * A * 16, zero.shape[1], B * KE // zero.shape[1])
    return (w - zero.to(w.dtype)[:, :, None]).to(dtype)
