"""How codes lie in memory. The only file that knows the order of bits there.

`qdata` is int32 `[N/16, K/KE, 128]`: tiles of 16 rows by KE = 256/bits columns, 512 bytes each.
The four words (16 bytes) at `4·lane` are what lane `lane` of a warp feeds to a 16×8×16 matrix instruction as operand
"A", so a kernel loads 16 bytes per lane and shuffles nothing (the fragment order of mma.sync and wgmma). With
lane = 4·g + t:

    row    = 16·tile_row + 8·row_half + g                          g in 0…7, t in 0…3
    column = KE·tile_column + 16·step + 8·k_half + 2·t + e         e in 0…1

    bits  KE   word of the lane      place of a code within its word, in units of `bits`, from the lowest
    4      64  step                  row_half + 2·k_half + 4·e
    2     128  step // 2             row_half + 2·k_half + 4·(step % 2) + 8·e
    8      32  2·step + k_half       row_half + 2·e
    3     128  as 2 bits for the low two bits, and beside it a plane of the high bits, int32 [N/16, K/128, 64],
               two words a lane:
               step // 4             row_half + 2·k_half + 4·(step % 2) + 8·(step // 2 % 2) + 16·e

`scale_zero` is int32 `[N/16, G, 16]`: the scale's fp16 bits in the low half, the zero point in the high half; one word
that a kernel can load asynchronously, whatever the model's dtype. Every tensor has dim 0 ∝ N and dim 1 ∝ K, so sharding
either one is a plain slice. Rows and columns that do not fill a tile are padded with zeros.

`pack_words` goes from files (`bit_stream.py`) to this layout without taking codes apart, which is what loading a
checkpoint comes down to.

Leading dimensions (a stack of experts) pass through all functions here. Words are viewed as bytes: PyTorch runs on
little-endian machines only.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gptq_ao.codes.bit_stream import unpack_bits
from gptq_ao.codes.reinterpret import reinterpret

__all__ = [
    "TILE_ROWS",
    "pack_codes",
    "pack_scale_zero",
    "pack_words",
    "packed_bytes",
    "tile_columns",
    "unpack_codes",
    "unpack_scale_zero",
]

TILE_ROWS = 16


@dataclass(frozen=True)
class Plane:
    """One tensor of packed codes: how a [16·T, columns·C] matrix of codes is split and re-ordered.

    Attributes:
        bits: width of a code in this plane.
        columns: the factors of a tile's columns, outermost first.
        order: the axes (row_half, g, *columns) of a tile in memory: those that number its words, then those that
            number the places within a word, highest first.
    """

    bits: int
    columns: tuple[int, ...]
    order: tuple[int, ...]

    @property
    def tile_columns(self) -> int:
        return torch.Size(self.columns).numel()

    @property
    def permutation(self) -> list[int]:
        """From (lead, tile_row, row_half, g, tile_column, *columns) to (lead, tile_row, tile_column, *order)."""
        return [0, 1, 4, *(axis + 2 if axis < 2 else axis + 3 for axis in self.order)]


# factors of the columns                          order: words (g, t, …), then places from the highest (e, …, row_half)
_FOUR = Plane(4, (4, 2, 4, 2), (1, 4, 2, 5, 3, 0))  # step, k_half, t, e
_TWO = Plane(2, (4, 2, 2, 4, 2), (1, 5, 2, 6, 3, 4, 0))  # step // 2, step % 2, k_half, t, e
_ONE = Plane(1, (2, 2, 2, 2, 4, 2), (1, 6, 2, 7, 3, 4, 5, 0))  # step // 4, step // 2 % 2, step % 2, k_half, t, e
_EIGHT = Plane(8, (2, 2, 4, 2), (1, 4, 2, 3, 5, 0))  # step, k_half, t, e

_PLANES = {2: (_TWO,), 3: (_TWO, _ONE), 4: (_FOUR,), 8: (_EIGHT,)}


@dataclass(frozen=True)
class Exchange:
    """How words of rows become words of tiles, for codes that do not cross words.

    The code of row r and column k has a place in its word, and the word an index; both are made of the bits of r and k
    that `row_half`, g, t, … of the table above stand for. A word of a row has the lowest bits of k as its places, e
    first, then t; one of a tile has e, row_half and others. To exchange a bit of the place with one of the index is
    to swap every other field between two words.

    Attributes:
        factors: of the words of a row in a tile, outermost first.
        outer: two axes of (row_half, g, *factors), of size 2. At the end they are the low and the high bit of t.
        swaps: (bit of the place, which of the two axes), in order.
    """

    factors: tuple[int, ...]
    outer: tuple[int, int]
    swaps: tuple[tuple[int, int], ...]


_BLOCK_WORDS = 2**20  # taken at once: they stay in the processor's cache, and what is held beside a weight is small

# Bits of a place, from the lowest, before and after; what the factors are; what the axes are.
_EXCHANGES = {
    # e, t, t to row_half, k_half, e; step, k_half; k_half, row_half
    4: Exchange((4, 2), (3, 0), ((0, 1), (1, 0), (2, 1))),
    # e, t, t, k_half to row_half, k_half, step % 2, e; step // 2, step % 2; row_half, step % 2
    2: Exchange((4, 2), (0, 3), ((0, 0), (2, 1), (3, 0), (1, 0))),
    # e, t to row_half, e; step, k_half, t // 2; row_half, t // 2
    8: Exchange((2, 2, 2), (0, 4), ((0, 0), (1, 0))),
}


def tile_columns(bits: int) -> int:
    """KE, the columns of one tile."""
    return _PLANES[bits][0].tile_columns


def pack_codes(codes: Tensor, bits: int) -> tuple[Tensor, Tensor | None]:
    """Codes uint8 [..., N, K] to `qdata` int32 [..., N/16, K/KE, 128] and, for 3 bits, the plane of high bits."""
    low, *high = _PLANES[bits]
    codes = _pad(codes, TILE_ROWS, low.tile_columns)
    if not high:
        return _pack_plane(codes, low), None
    return _pack_plane(codes & 3, low), _pack_plane(codes >> 2, high[0])


def pack_words(words: Tensor, bits: int, in_features: int) -> tuple[Tensor, Tensor | None]:
    """What `pack_codes` makes, of codes in the file layout: int32 [..., N, ⌈K·bits/32⌉], in any strides."""
    if bits not in _EXCHANGES:  # 3 bits: codes cross words
        return pack_codes(unpack_bits(reinterpret(words, torch.uint8), bits, in_features), bits)
    *lead, n, width = words.shape
    tile_rows, tile_cols = -(-n // TILE_ROWS), -(-in_features // tile_columns(bits))
    tiles = words.new_empty(torch.Size(lead).numel(), tile_rows, tile_cols, 8, 2, 2, 4)  # a lane is g, t // 2, t % 2
    at_once = max(1, _BLOCK_WORDS // width // TILE_ROWS)
    blocks = words.reshape(-1, n, width).split(at_once * TILE_ROWS, 1)
    for block, out in zip(blocks, tiles.split(at_once, 1), strict=True):
        _exchange(_without_rest(block, in_features * bits % 32), bits, out)
    return tiles.view(*lead, tile_rows, tile_cols, 128), None


def unpack_codes(qdata: Tensor, high_plane: Tensor | None, bits: int, out_features: int, in_features: int) -> Tensor:
    """The inverse of `pack_codes`: uint8 [..., out_features, in_features]."""
    low, *high = _PLANES[bits]
    codes = _unpack_plane(qdata, low)
    if high_plane is not None:
        codes |= _unpack_plane(high_plane, high[0]) << 2
    return codes[..., :out_features, :in_features]


def pack_scale_zero(scale: Tensor, zero_point: Tensor) -> Tensor:
    """fp16 and uint8 [..., N, G] to int32 [..., N/16, G, 16]."""
    word = (scale.contiguous().view(torch.int16).int() & 0xFFFF) | (zero_point.int() << 16)
    return _pad(word, TILE_ROWS, 1).unflatten(-2, (-1, TILE_ROWS)).transpose(-1, -2).contiguous()


def unpack_scale_zero(scale_zero: Tensor, out_features: int) -> tuple[Tensor, Tensor]:
    """The inverse of `pack_scale_zero`: scale fp16 and zero_point uint8 [..., out_features, G]."""
    word = scale_zero.transpose(-1, -2).flatten(-3, -2)[..., :out_features, :]
    scale = (word & 0xFFFF).to(torch.int16).view(torch.float16)
    return scale, (word >> 16).to(torch.uint8)


def packed_bytes(shape: tuple[int, ...], bits: int, groups: int) -> int:
    """Of codes [..., N, K] with `groups` groups per row in the run-time layout, scales and zero points included."""
    *lead, n, k = shape
    columns = tile_columns(bits)
    rows = -(-n // TILE_ROWS) * TILE_ROWS
    codes = rows * (-(-k // columns) * columns) * bits // 8
    return torch.Size(lead).numel() * (codes + 4 * rows * groups)


def _pack_plane(codes: Tensor, plane: Plane) -> Tensor:
    *lead, rows, columns = codes.shape
    tile_rows, tile_cols = rows // TILE_ROWS, columns // plane.tile_columns
    split = codes.reshape(-1, tile_rows, 2, 8, tile_cols, *plane.columns).permute(plane.permutation)
    bits = plane.bits
    while bits < 8:  # the last factors, of two each, are places within a byte: what moves is bytes, not codes
        low, high = split.unbind(-1)
        split, bits = low | high << bits, 2 * bits
    return reinterpret(split.flatten(), torch.int32).view(*lead, tile_rows, tile_cols, -1)


def _unpack_plane(words: Tensor, plane: Plane) -> Tensor:
    *lead, tile_rows, tile_cols, _ = words.shape
    # Byte by byte, a quarter of the traffic of whole words.
    place = torch.arange(0, 8, plane.bits, dtype=torch.uint8, device=words.device)
    codes = (reinterpret(words, torch.uint8).unsqueeze(-1) >> place).bitwise_and_(2**plane.bits - 1)
    factors = (2, 8, *plane.columns)
    split = codes.reshape(-1, tile_rows, tile_cols, *(factors[axis] for axis in plane.order))
    inverse = sorted(range(len(plane.permutation)), key=plane.permutation.__getitem__)
    return split.permute(inverse).reshape(*lead, tile_rows * TILE_ROWS, tile_cols * plane.tile_columns)


def _exchange(words: Tensor, bits: int, tiles: Tensor) -> None:
    """Words of rows [L, N, W] to words of tiles, which are written to `tiles`."""
    exchange = _EXCHANGES[bits]
    words = _pad(words, TILE_ROWS, torch.Size(exchange.factors).numel())
    split = words.reshape(len(words), -1, 2, 8, tiles.shape[2], *exchange.factors)
    low, high = (axis + 2 if axis < 2 else axis + 3 for axis in exchange.outer)
    inner = [axis for axis in range(5, split.dim()) if axis not in (low, high)]
    rest = [axis for axis in (0, 1, 4, 3) if axis not in (low, high)]
    # Words of a lane first: of the orders that lead there, copies of long runs both here and below.
    moved = split.permute(low, high, *inner, *rest).clone(memory_format=torch.contiguous_format)
    for place, axis in exchange.swaps:
        first, second = moved.unbind(axis)
        _swap_fields(first, second, bits, place)
    lanes = moved.view(2, 2, 4, *tiles.shape[:4])
    for t in range(4):
        tiles[..., t // 2, t % 2, :].copy_(lanes[t % 2, t // 2].permute(1, 2, 3, 4, 0))


def _without_rest(words: Tensor, used: int) -> Tensor:
    """Clear the bits of each row's last word from bit `used` on. `used` is 0 where the row fills its last word."""
    if not used:
        return words
    words = words.clone()
    words[..., -1] &= (1 << used) - 1
    return words


def _swap_fields(first: Tensor, second: Tensor, bits: int, place: int) -> None:
    """In place, int32: fields of `first` whose number has the bit `place`, with those of `second` that have it not."""
    mask = sum((2**bits - 1) << bits * field for field in range(32 // bits) if not field >> place & 1)
    differ = first >> (bits << place)
    differ ^= second
    differ &= mask
    second ^= differ
    differ <<= bits << place
    first ^= differ


def _pad(x: Tensor, rows: int, columns: int) -> Tensor:
    """Zeros after the last row and column, up to multiples of `rows` and `columns`."""
    *_, n, k = x.shape
    if n % rows == 0 and k % columns == 0:
        return x
    return torch.nn.functional.pad(x, (0, -k % columns, 0, -n % rows))
