"""GPTQ's tensors: every number exactly, whoever packed them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from gptq_ao.checkpoint.gptq.read import gptq_settings
from gptq_ao.checkpoint.gptq.tensors import ZeroPoints, decode_gptq, encode_gptq
from gptq_ao.errors import CheckpointError

from .writers import decremented, dense, gptq_tensors, meant

GPTQMODEL = ZeroPoints(1, sym=False, borrows=True)
AUTOGPTQ = ZeroPoints(1, sym=False, borrows=False)
V2 = ZeroPoints(2, sym=False, borrows=False)


def parts(bits: int, n: int = 64, k: int = 128, group_size: int = 32, sym: bool = False) -> tuple[Tensor, ...]:
    """codes, scale, zero_point and the natural group of each column; a fifth of the zero points are 0."""
    generator = torch.Generator().manual_seed(bits)
    groups = -(-k // group_size)
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=generator)
    scale = torch.randn(n, groups, generator=generator).half()
    zero_point = torch.randint(0, 2**bits, (n, groups), dtype=torch.uint8, generator=generator)
    zero_point[torch.rand(n, groups, generator=generator) < 0.2] = 0
    if sym:
        zero_point.fill_(2 ** (bits - 1))
    return codes, scale, zero_point, torch.arange(k) // group_size


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
def test_codes_scales_and_zero_points(bits: int, version: int) -> None:
    codes, scale, zero_point, group_of = parts(bits)
    tensors = gptq_tensors(codes, scale, zero_point, group_of, bits, version)
    read = decode_gptq(tensors, bits, 128, 32, V2 if version == 2 else GPTQMODEL)
    assert (read.bits, read.perm, read.rounded) == (bits, None, 0.0)
    assert torch.equal(read.codes, codes)
    assert torch.equal(read.scale, scale)
    assert torch.equal(read.zero_point, zero_point)


def test_a_zero_point_of_zero_borrows_from_its_neighbour() -> None:
    """Worked by hand: 0, 5, 0, 0, 9, 15, 1, 7 minus 0x11111111 is, field by field, 15, 3, 15, 14, 7, 14, 0, 6."""
    true = torch.tensor([[0, 5, 0, 0, 9, 15, 1, 7]], dtype=torch.uint8)
    word = int(decremented(true, 4, "gptqmodel")) % 2**32
    assert [(word >> (4 * j)) & 15 for j in range(8)] == [15, 3, 15, 14, 7, 14, 0, 6]
    codes, scale, _, group_of = parts(4, n=8, k=32)
    tensors = gptq_tensors(codes, scale, true.T, group_of, 4)
    assert decode_gptq(tensors, 4, 32, 32, GPTQMODEL).zero_point.T.tolist() == true.tolist()


def test_three_bits_cross_words_as_in_the_original_kernels() -> None:
    """Ten codes, the eleventh split 2 + 1, ten codes, the twenty-second split 1 + 2, ten codes."""
    codes = torch.randint(0, 8, (1, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    c = codes[0].tolist()
    first = sum(c[j] << (3 * j) for j in range(10)) | (c[10] & 3) << 30
    second = c[10] >> 2 | sum(c[11 + j] << (3 * j + 1) for j in range(10)) | (c[21] & 1) << 31
    third = c[21] >> 1 | sum(c[22 + j] << (3 * j + 2) for j in range(10))
    packed = [w - 2**32 if w >= 2**31 else w for w in (first, second, third)]
    tensors = {
        "qweight": torch.tensor(packed, dtype=torch.int32)[:, None],
        "qzeros": torch.zeros(1, 1, dtype=torch.int32),
        "scales": torch.ones(1, 1).half(),
    }
    assert torch.equal(decode_gptq(tensors, 3, 32, 32, V2).codes, codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("written", [1, 2])
@pytest.mark.parametrize("labelled", [1, 2])
def test_what_a_symmetric_checkpoint_stores_counts_not_its_label(bits: int, written: int, labelled: int) -> None:
    """At 4 bits: sevens are version 1, eights version 2."""
    codes, scale, zero_point, group_of = parts(bits, sym=True)
    tensors = gptq_tensors(codes, scale, zero_point, group_of, bits, written)
    read = decode_gptq(tensors, bits, 128, 32, ZeroPoints(labelled, sym=True, borrows=False))
    assert torch.equal(read.zero_point, zero_point)


def test_an_asymmetric_label_is_trusted() -> None:
    codes, scale, zero_point, group_of = parts(4)
    eights = torch.full_like(zero_point, 8)
    tensors = gptq_tensors(codes, scale, eights, group_of, 4, version=2)
    assert decode_gptq(tensors, 4, 128, 32, GPTQMODEL).zero_point.unique().tolist() == [9]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_autogptq_loses_what_is_above_a_zero_point_of_zero(bits: int) -> None:
    codes, scale, zero_point, group_of = parts(bits)
    tensors = gptq_tensors(codes, scale, zero_point, group_of, bits, 1, "autogptq")
    with pytest.raises(CheckpointError, match=r"loses those above a zero point of 0, and there are such"):
        decode_gptq(tensors, bits, 128, 32, AUTOGPTQ)
    fine = zero_point.clamp(min=1)
    last = 32 // bits - 1
    fine[last :: last + 1] = 0  # nothing is above the last field of a word
    tensors = gptq_tensors(codes, scale, fine, group_of, bits, 1, "autogptq")
    assert torch.equal(decode_gptq(tensors, bits, 128, 32, AUTOGPTQ).zero_point, fine)


def test_activation_order_becomes_a_permutation() -> None:
    codes, scale, zero_point, natural = parts(4)
    group_of = natural[torch.randperm(128, generator=torch.Generator().manual_seed(0))]
    tensors = gptq_tensors(codes, scale, zero_point, group_of, 4, 2)
    read = decode_gptq(tensors, 4, 128, 32, V2)
    assert read.perm is not None
    assert read.scale.shape == (64, 4)
    assert torch.equal(meant(read), dense(codes, scale, zero_point, group_of))
    written = encode_gptq(read, version=2)
    assert all(torch.equal(written[name], t) for name, t in tensors.items())


@pytest.mark.parametrize(
    "group_of",
    [
        torch.arange(4),
        torch.tensor([2, 0, 3, 1]),
        torch.tensor([3, 3, 1, 1]),
    ],
    ids=["natural", "groups-exchanged", "groups-missing"],
)
def test_whole_groups_in_any_order_need_no_permutation(group_of: Tensor) -> None:
    group_of = group_of.repeat_interleave(32)
    codes, scale, zero_point, _ = parts(4)
    read = decode_gptq(gptq_tensors(codes, scale, zero_point, group_of, 4, 2), 4, 128, 32, V2)
    assert read.perm is None
    assert torch.equal(meant(read), dense(codes, scale, zero_point, group_of))


@pytest.mark.parametrize("ordered", [False, True])
def test_a_last_group_that_is_smaller(ordered: bool) -> None:
    """352 features in groups of 128 are 11 groups of 32."""
    codes, scale, zero_point, group_of = parts(4, k=352, group_size=128)
    if ordered:
        group_of = group_of[torch.randperm(352, generator=torch.Generator().manual_seed(0))]
    tensors = gptq_tensors(codes, scale, zero_point, group_of, 4, 2)
    read = decode_gptq(tensors, 4, 352, 128, V2)
    assert read.scale.shape == (64, 11)
    assert (read.perm is not None) == ordered
    assert torch.equal(meant(read), dense(codes, scale, zero_point, group_of))
    if not ordered:
        del tensors["g_idx"]
        assert torch.equal(meant(decode_gptq(tensors, 4, 352, 128, V2)), dense(codes, scale, zero_point, group_of))


@pytest.mark.parametrize("value", [-1, 4, 2**31 - 1])
def test_a_group_that_is_not_there(value: int) -> None:
    codes, scale, zero_point, group_of = parts(4)
    tensors = gptq_tensors(codes, scale, zero_point, group_of.clone().index_fill_(0, torch.tensor([5]), value), 4)
    with pytest.raises(CheckpointError, match=rf"g_idx reaches from .*{value}.* of 4 groups"):
        decode_gptq(tensors, 4, 128, 32, V2)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e6])
def test_a_scale_that_is_no_number(value: float) -> None:
    codes, scale, zero_point, group_of = parts(4)
    scale = scale.float()
    scale[3, 1] = value
    with pytest.raises(CheckpointError, match=r"a scale is not finite as fp16"):
        decode_gptq(gptq_tensors(codes, scale, zero_point, group_of, 4), 4, 128, 32, V2)


def test_scales_of_other_types() -> None:
    """bf16 fits into fp16 where it is not tiny; the rounding of what does not fit is known."""
    codes, scale, zero_point, group_of = parts(4)
    exact = scale.bfloat16()
    read = decode_gptq(gptq_tensors(codes, exact, zero_point, group_of, 4, 2), 4, 128, 32, V2)
    assert torch.equal(read.scale.bfloat16(), exact)
    assert read.rounded == 0
    tiny = exact.clone()
    tiny[0, 0] = 2**-20 * 1.0078125  # 8 significant bits, of which fp16 has 5 there
    rounded = decode_gptq(gptq_tensors(codes, tiny, zero_point, group_of, 4, 2), 4, 128, 32, V2).rounded
    assert rounded == pytest.approx(1 - 1 / 1.0078125)
    zero = exact.clone().index_fill_(1, torch.tensor([2]), 0)
    assert decode_gptq(gptq_tensors(codes, zero, zero_point, group_of, 4, 2), 4, 128, 32, V2).rounded == 0


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "marlin": ({"checkpoint_format": "marlin"}, r"of the format 'marlin' cannot be read, only gptq, gptq_v2"),
    "planar": ({"format": "gptq_p"}, r"of the format 'gptq_p'"),
    "rotation": ({"rotation": "hadamard"}, r"has rotation 'hadamard': it is more than quantized weights"),
    "words": ({"pack_dtype": "int16"}, r"packed in 'int16', only int32"),
    "bits": ({"bits": 5}, r"weights of 5 bits, only \(2, 3, 4, 8\)"),
    "no-bits": ({"bits": None}, r"'bits' is None, not a number"),
    "bits-bool": ({"bits": True}, r"'bits' is True, not a number"),
    "group": ({"group_size": 0}, r"group_size of 0"),
    "override": ({"dynamic": {"a": {"bits": 9}}}, r"weights of 9 bits"),
    "dynamic": ({"dynamic": {"a": 3}}, r"'dynamic' gives patterns no settings"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_that_ask_for_what_cannot_be_read(case: str) -> None:
    change, message = CONFIGS[case]
    with pytest.raises(CheckpointError, match=message):
        gptq_settings({"bits": 4, "group_size": 32, "sym": True, **change})


def test_names_that_settings_had() -> None:
    old = gptq_settings({"w_bit": 4, "q_group_size": 128, "zero_point": True})
    assert (old.bits, old.group_sizes, old.zero_points) == ({4}, {128}, ZeroPoints(1, False, False))
    meta = {"quantizer": ["optimum:1.2", "gptqmodel:1.0.0"]}
    new = gptq_settings({"bits": 4, "group_size": -1, "sym": False, "format": "gptq_v2", "meta": meta})
    assert new.zero_points == ZeroPoints(2, False, True)
    skipped = gptq_settings({"bits": 4, "group_size": 32, "dynamic": {"-:.*": {"bits": 99}, "+:.*k": {"bits": 8}}})
    assert skipped.bits == {4, 8}
