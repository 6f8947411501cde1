"""Products in full precision, and made of cheaper ones that are as good."""

import pytest
import torch
from torch import Tensor

from gptq_ao.solver.fp32 import PARTS, ieee_fp32, product

U = 2.0**-24  # unit roundoff of fp32
SHAPES = [(1, 1, 1), (3, 40, 7), (129, 333, 65), (64, 4096, 300), (5, 0, 6)]


def factors(m: int, k: int, n: int) -> tuple[Tensor, Tensor]:
    """Of many sizes, so that what is cut off matters."""
    generator = torch.Generator().manual_seed(m + k + n)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-12, 12, shape, generator=generator)

    return random(m, k), random(k, n)


def check(device: str, m: int, k: int, n: int) -> None:
    left, right = factors(m, k, n)
    exact, size = left.double() @ right.double(), left.double().abs() @ right.double().abs()
    for a, b in ((left, right), (left.T.contiguous().T, right.T.contiguous().T)):
        with ieee_fp32():
            got = product(a.to(device), b.to(device)).cpu()
        assert got.shape == exact.shape
        assert ((got.double() - exact).abs() <= (2.0**-21 + 2 * (k + 2) * U) * size).all()


@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_a_product_is_precise(m: int, k: int, n: int) -> None:
    check("cpu", m, k, n)


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_a_product_on_a_gpu_is_precise(m: int, k: int, n: int) -> None:
    check("cuda", m, k, n)


@pytest.mark.gpu
def test_three_digits_are_one_product() -> None:
    a, b = (t.cuda() for t in factors(40, 500, 70))
    with ieee_fp32(cuda="tf32"):
        assert torch.equal(product(a, b), a @ b)


@pytest.mark.gpu
def test_parts_take_no_more_than_they_should() -> None:
    a, b = torch.ones(16, 8192, device="cuda"), torch.ones(8192, 20000, device="cuda")
    with ieee_fp32():
        product(a, b)  # cuBLAS takes a workspace
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        product(a, b)
    taken = torch.cuda.max_memory_allocated() - before - 4 * 16 * 20000 - 2 * 4 * 16 * 8192
    assert b.nbytes * 2 > PARTS  # or else this says nothing
    assert taken <= PARTS + 2**20
