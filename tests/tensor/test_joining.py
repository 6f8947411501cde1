"""Quantized weights stacked, joined and taken apart: what conversions of checkpoints do with them."""

import pytest
import torch
from torch import Tensor

from gptq_ao.tensor import GroupTensor, tensor_class


def weight(
    n: int = 32, k: int = 64, *, bits: int = 4, seed: int = 0, lead: tuple[int, ...] = (), **more: object
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (*lead, n, k), dtype=torch.uint8, generator=generator)
    scale = torch.randn(*lead, n, k // 32, generator=generator).half()
    zero_point = torch.randint(0, 2**bits, (*lead, n, k // 32), dtype=torch.uint8, generator=generator)
    return tensor_class(bits).from_codes(codes, scale, zero_point, dtype=torch.float32, **more)  # type: ignore[arg-type]


def dense(*weights: Tensor) -> list[Tensor]:
    return [w.dequantize() for w in weights]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_stack_and_take_apart(bits: int, transposed: bool) -> None:
    parts = [weight(bits=bits, seed=i, transposed=transposed) for i in range(3)]
    stack = torch.stack(parts)
    assert isinstance(stack, GroupTensor)
    assert torch.equal(stack.dequantize(), torch.stack(dense(*parts)))
    for chunk, part in zip(torch.chunk(stack, 3), parts, strict=True):
        for one in (chunk.squeeze(0), chunk.squeeze()):
            assert isinstance(one, GroupTensor)
            assert torch.equal(one.dequantize(), part.dequantize())
    assert torch.equal(torch.cat([stack, stack]).dequantize(), torch.cat(dense(stack, stack)))


@pytest.mark.parametrize("rows", [(32, 16), (32, 20), (20, 12, 32), (7, 9)], ids=str)
@pytest.mark.parametrize("lead", [(), (2,)])
@pytest.mark.parametrize("transposed", [False, True])
def test_join_along_the_output_features(rows: tuple[int, ...], lead: tuple[int, ...], transposed: bool) -> None:
    parts = [weight(n, seed=i, lead=lead, transposed=transposed) for i, n in enumerate(rows)]
    dim = -1 if transposed else -2
    joined = torch.cat(parts, dim)
    assert isinstance(joined, GroupTensor)
    assert torch.equal(joined.dequantize(), torch.cat(dense(*parts), dim))
    x = torch.randn(3, 64)
    product = x @ (joined if transposed else joined.mT)
    assert torch.allclose(product, x @ (joined.dequantize() if transposed else joined.dequantize().mT), atol=1e-4)


def test_one_order_may_be_shared() -> None:
    perm = torch.randperm(64)
    a, b = weight(perm=perm), weight(seed=1, perm=perm)
    assert torch.equal(torch.cat([a, b]).dequantize(), torch.cat(dense(a, b)))
    with pytest.raises(ValueError, match="cannot be stacked: their columns are in different orders"):
        torch.stack([a, weight(seed=1, perm=perm.flip(0))])
    with pytest.raises(ValueError, match="cannot be concatenated: their columns are in different orders"):
        torch.cat([a, weight(seed=1)])


def test_what_cannot_become_one() -> None:
    cases = [
        ([weight(), weight(bits=8)], 0, r"they differ: Int4GroupTensor.* and Int8GroupTensor"),
        ([weight(), weight(k=96)], 0, r"they differ"),
        ([weight(), torch.zeros(32, 64)], 0, r"some are quantized and some are not"),
        ([weight(k=96), weight(k=96)], 1, r"their input features can be joined only where tiles and groups end"),
    ]
    for parts, dim, message in cases:
        with pytest.raises(ValueError, match=rf"cannot be concatenated: {message}"):
            torch.cat(parts, dim)
    with pytest.raises(ValueError, match=r"cannot be stacked: their shapes differ"):
        torch.stack([weight(32), weight(16)])
    with pytest.raises(ValueError, match=r"cannot be stacked: dimension 1 is not in front"):
        torch.stack([weight(), weight()], 1)
    one = weight(1)
    assert torch.equal(one.squeeze(), one.dequantize().squeeze())  # that can become dense
