from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptq_ao.codes import tiles
from gptq_ao.codes.bit_stream import codes_to_words, pack_bits, unpack_bits, word_count, words_to_codes
from gptq_ao.codes.tiles import (
    TILE_ROWS,
    pack_codes,
    pack_scale_zero,
    pack_words,
    tile_columns,
    unpack_codes,
    unpack_scale_zero,
)

COLUMNS = {2: 128, 3: 128, 4: 64, 8: 32}
every_bits = pytest.mark.parametrize("bits", COLUMNS, ids=lambda b: f"{b}bit")
Parts = tuple[torch.Tensor, torch.Tensor | None]


def random_codes(*shape: int, bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=generator)


def same(a: Parts, b: Parts) -> bool:
    high = a[1] is b[1] if a[1] is None or b[1] is None else torch.equal(a[1], b[1])
    return high and torch.equal(a[0], b[0])


@every_bits
@pytest.mark.parametrize(
    "shape", [(16, 128), (32, 256), (1, 1), (19, 130), (40, 96), (3, 5, 33), (2, 3, 17, 129)], ids=lambda s: f"{s}"
)
def test_round_trip(bits: int, shape: tuple[int, ...]) -> None:
    codes = random_codes(*shape, bits=bits)
    before = codes.clone()
    qdata, high = pack_codes(codes, bits)
    *lead, n, k = shape
    tiles = (*lead, -(-n // TILE_ROWS), -(-k // COLUMNS[bits]))
    assert qdata.dtype == torch.int32
    assert qdata.shape == (*tiles, 128)
    assert qdata.is_contiguous()
    assert (high is not None) == (bits == 3)
    if high is not None:
        assert high.dtype == torch.int32
        assert high.shape == (*tiles, 64)
    unpacked = unpack_codes(qdata, high, bits, n, k)
    assert unpacked.dtype == torch.uint8
    assert torch.equal(unpacked, codes)
    assert torch.equal(codes, before)


@every_bits
def test_tile_columns(bits: int) -> None:
    assert tile_columns(bits) == COLUMNS[bits]


@every_bits
def test_padding_is_zero(bits: int) -> None:
    codes = torch.full((19, 130), 2**bits - 1, dtype=torch.uint8)
    qdata, high = pack_codes(codes, bits)
    columns = qdata.shape[1] * COLUMNS[bits]
    everything = unpack_codes(qdata, high, bits, 32, columns)
    assert everything.sum() == codes.sum(dtype=torch.int64)
    assert torch.equal(everything[:19, :130], codes)


@every_bits
def test_non_contiguous_codes(bits: int) -> None:
    codes = random_codes(260, 70, bits=bits)
    assert same(pack_codes(codes.T, bits), pack_codes(codes.T.contiguous(), bits))
    assert same(pack_codes(codes[::2, 1::3], bits), pack_codes(codes[::2, 1::3].contiguous(), bits))


@every_bits
def test_leading_dimensions_are_separate_weights(bits: int) -> None:
    codes = random_codes(3, 19, 130, bits=bits)
    qdata, high = pack_codes(codes, bits)
    for i in range(3):
        assert same((qdata[i], None if high is None else high[i]), pack_codes(codes[i], bits))


def places(bits: int) -> Iterator[tuple[int, int, int, int]]:
    """The documented table for 2, 4 and 8 bits (2 also for the low plane of 3): (row, column, word, lowest bit)."""
    columns = {2: 128, 4: 64, 8: 32}[bits]
    for lane in range(32):
        g, t = divmod(lane, 4)
        for step in range(columns // 16):
            for row_half, k_half, e in ((r, k, e) for r in range(2) for k in range(2) for e in range(2)):
                word, place = {
                    4: (step, row_half + 2 * k_half + 4 * e),
                    2: (step // 2, row_half + 2 * k_half + 4 * (step % 2) + 8 * e),
                    8: (2 * step + k_half, row_half + 2 * e),
                }[bits]
                yield 8 * row_half + g, 16 * step + 8 * k_half + 2 * t + e, 4 * lane + word, place * bits


def high_places() -> Iterator[tuple[int, int, int, int]]:
    """The plane of the high bits of 3."""
    for lane in range(32):
        g, t = divmod(lane, 4)
        for step in range(8):
            for row_half, k_half, e in ((r, k, e) for r in range(2) for k in range(2) for e in range(2)):
                place = row_half + 2 * k_half + 4 * (step % 2) + 8 * (step // 2 % 2) + 16 * e
                yield 8 * row_half + g, 16 * step + 8 * k_half + 2 * t + e, 2 * lane + step // 4, place


def read(words: torch.Tensor, table: Iterator[tuple[int, int, int, int]], bits: int, columns: int) -> list[list[int]]:
    """All codes of [tile rows, tile columns, words], one at a time."""
    tiles = words.tolist()
    table_entries = list(table)
    matrix = [[-1] * (columns * len(tiles[0])) for _ in range(TILE_ROWS * len(tiles))]
    for tile_row, row_of_tiles in enumerate(tiles):
        for tile_column, tile in enumerate(row_of_tiles):
            for row, column, word, lowest in table_entries:
                code = (tile[word] & 0xFFFFFFFF) >> lowest & (2**bits - 1)
                matrix[TILE_ROWS * tile_row + row][columns * tile_column + column] = code
    return matrix


@pytest.mark.parametrize("bits", [2, 4, 8], ids=lambda b: f"{b}bit")
def test_layout_is_the_documented_one(bits: int) -> None:
    columns = COLUMNS[bits]
    codes = random_codes(32, 3 * columns, bits=bits)
    qdata, _ = pack_codes(codes, bits)
    assert read(qdata, places(bits), bits, columns) == codes.tolist()


def test_layout_is_the_documented_one_3bit() -> None:
    codes = random_codes(32, 384, bits=3)
    qdata, high = pack_codes(codes, 3)
    assert high is not None
    assert read(qdata, places(2), 2, 128) == (codes & 3).tolist()
    assert read(high, high_places(), 1, 128) == (codes >> 2).tolist()


@every_bits
@pytest.mark.parametrize(("first", "last"), [(0, 1), (1, 3), (2, 3)], ids=["0:1", "1:3", "2:3"])
def test_slices_at_tiles_are_packings_of_slices(bits: int, first: int, last: int) -> None:
    columns = COLUMNS[bits]
    codes = random_codes(3 * TILE_ROWS, 3 * columns, bits=bits)
    qdata, high = pack_codes(codes, bits)

    rows = pack_codes(codes[first * TILE_ROWS : last * TILE_ROWS], bits)
    assert same((qdata[first:last], None if high is None else high[first:last]), rows)

    some_columns = pack_codes(codes[:, first * columns : last * columns], bits)
    assert same((qdata[:, first:last], None if high is None else high[:, first:last]), some_columns)


@pytest.mark.parametrize("shape", [(16, 1), (19, 3), (1, 7), (2, 33, 2)], ids=lambda s: f"{s}")
def test_scale_zero_round_trip(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    scale = torch.randn(shape, generator=generator).half()
    zero = random_codes(*shape, bits=8)
    packed = pack_scale_zero(scale, zero)
    *lead, n, groups = shape
    assert packed.dtype == torch.int32
    assert packed.shape == (*lead, -(-n // 16), groups, 16)
    assert packed.is_contiguous()
    unpacked = unpack_scale_zero(packed, n)
    assert torch.equal(unpacked[0], scale)
    assert torch.equal(unpacked[1], zero)


def test_scale_zero_keeps_every_bit() -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)  # also subnormal, negative, infinite, NaN
    scale = bits.view(torch.float16).reshape(256, 256)
    zero = torch.arange(256, dtype=torch.uint8).expand(256, 256)  # non-contiguous
    unpacked = unpack_scale_zero(pack_scale_zero(scale, zero), 256)
    assert torch.equal(unpacked[0].contiguous().view(torch.int16), scale.view(torch.int16))
    assert torch.equal(unpacked[1], zero)


def test_scale_zero_word() -> None:
    scale = torch.tensor([[1.0], [-2.0], [2.0**-24]], dtype=torch.float16)
    zero = torch.tensor([[0], [255], [8]], dtype=torch.uint8)
    words = pack_scale_zero(scale, zero)
    assert words.tolist() == [[[0x3C00, 0xFFC000, 0x080001] + [0] * 13]]


def test_scale_zero_of_a_transposed_scale() -> None:
    generator = torch.Generator().manual_seed(2)
    scale, zero = torch.randn(5, 40, generator=generator).half().T, random_codes(5, 40, bits=8).T
    assert torch.equal(pack_scale_zero(scale, zero), pack_scale_zero(scale.contiguous(), zero.contiguous()))


@pytest.mark.parametrize(("first", "last"), [(0, 1), (1, 3)], ids=["0:1", "1:3"])
def test_scale_zero_slices(first: int, last: int) -> None:
    generator = torch.Generator().manual_seed(3)
    scale, zero = torch.randn(48, 3, generator=generator).half(), random_codes(48, 3, bits=4)
    packed = pack_scale_zero(scale, zero)
    rows = slice(first * TILE_ROWS, last * TILE_ROWS)
    assert torch.equal(packed[first:last], pack_scale_zero(scale[rows], zero[rows]))
    assert torch.equal(packed[:, first:last], pack_scale_zero(scale[:, first:last], zero[:, first:last]))


def as_stream(codes: list[int], bits: int) -> list[int]:
    """One big little-endian integer."""
    number = sum(code << (bits * j) for j, code in enumerate(codes))
    return list(number.to_bytes(-(-len(codes) * bits // 8), "little"))


@settings(max_examples=150, deadline=None, database=None, derandomize=True)
@given(st.sampled_from(list(COLUMNS)), st.data())
def test_bit_stream(bits: int, data: st.DataObject) -> None:
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=40))
    tensor = torch.tensor(codes, dtype=torch.uint8)
    stream = pack_bits(tensor, bits)
    assert stream.dtype == torch.uint8
    assert stream.tolist() == as_stream(codes, bits)
    assert torch.equal(unpack_bits(stream, bits, len(codes)), tensor)


def test_bit_stream_of_3_bits_straddles_bytes() -> None:
    codes = torch.tensor([0, 0, 0b111, 0, 0, 0b101, 0, 0, 1], dtype=torch.uint8)
    assert pack_bits(codes, 3).tolist() == [0b11000000, 0b10000001, 0b00000010, 0b00000001]


@every_bits
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (2, 3, 7)], ids=lambda s: f"{s}")
def test_bit_stream_per_row(bits: int, shape: tuple[int, ...]) -> None:
    codes = random_codes(*shape, bits=bits)
    stream = pack_bits(codes, bits)
    rows = [as_stream(row, bits) for row in codes.flatten(0, -2).tolist()]
    assert stream.shape == (*shape[:-1], -(-shape[-1] * bits // 8))
    assert stream.flatten(0, -2).tolist() == rows
    assert torch.equal(unpack_bits(stream, bits, shape[-1]), codes)


def test_bit_stream_of_non_contiguous_codes() -> None:
    codes = random_codes(33, 6, bits=3).T
    assert torch.equal(pack_bits(codes, 3), pack_bits(codes.contiguous(), 3))
    stream = pack_bits(codes, 3).T.contiguous().T
    assert torch.equal(unpack_bits(stream, 3, 33), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("rows", [1, 3])  # a single row may have any stride
@pytest.mark.parametrize("count", [1, 5, 8, 10, 11, 12, 16, 33, 64])
def test_streams_are_contiguous_whatever_the_codes_are(bits: int, count: int, rows: int) -> None:
    """Files view them as words."""
    codes = torch.randint(0, 2**bits, (count, rows), dtype=torch.uint8).T
    stream = pack_bits(codes, bits)
    assert stream.is_contiguous()
    words = codes_to_words(codes, bits)
    assert words.shape == (rows, word_count(count, bits))
    assert torch.equal(words.view(torch.uint8)[:, : stream.shape[1]], stream)
    assert torch.equal(words_to_codes(words.T.contiguous().T, bits, count), codes)


@every_bits
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_words_become_tiles_as_their_codes_do(bits: int, data: st.DataObject) -> None:
    """Whatever lies in memory behind the last code of a row, and between the words."""
    lead = data.draw(st.lists(st.integers(1, 3), max_size=1))
    shape = (*lead, data.draw(st.integers(1, 40)), data.draw(st.integers(1, 300)))
    codes = random_codes(*shape, bits=bits, seed=data.draw(st.integers(0, 99)))
    words = codes_to_words(codes.flatten(0, -2), bits).view(*shape[:-1], -1)
    used = shape[-1] * bits % 32
    if used:
        words[..., -1] |= -1 << used
    if data.draw(st.booleans()):
        words = words.mT.contiguous().mT
    before = words.clone()
    with patch.object(tiles, "_BLOCK_WORDS", data.draw(st.sampled_from([1, 400, 2**20]))):
        packed = pack_words(words, bits, shape[-1])
    assert same(packed, pack_codes(codes, bits))
    assert packed[0].is_contiguous()
    assert torch.equal(words, before)
