from collections.abc import Iterator

import pytest
import torch

from gptq_ao.solver.fp32 import ieee_fp32
from gptq_ao.solver.hessian import HessianObserver

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
U = 2.0**-24  # unit roundoff of fp32


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def observe(*calls: torch.Tensor, mask: torch.Tensor | None = None) -> HessianObserver:
    observer = HessianObserver(calls[0].shape[-1])
    for x in calls:
        observer(x, mask)
        observer.end_batch()
    return observer


def exact(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """XᵀX / rows in fp64, and how far fp32 may be from it, whatever the order of summation."""
    rows = x.reshape(-1, x.shape[-1]).double()
    n = len(rows)
    # n products (rounded for fp32 inputs only), n - 1 sums and a division, each within U of its exact value. The
    # magnitude that errors are relative to is |X|ᵀ|X|; 1 % covers the products of errors.
    return rows.T @ rows / n, (rows.abs().T @ rows.abs()) / n * (n + 1) * U * 1.01


@DTYPES
@pytest.mark.parametrize("shape", [(1, 7), (300, 48), (3, 50, 33), (2, 3, 5, 17)], ids=lambda s: "x".join(map(str, s)))
def test_is_the_mean_of_the_rows_outer_products(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = random(*shape, dtype=dtype)
    before = x.clone()
    hessian = observe(x).finish()[0]
    expected, bound = exact(x)
    assert hessian.matrix.dtype == torch.float32
    assert hessian.rows == x.numel() // shape[-1]
    assert hessian.first_bad_batch is None
    assert ((hessian.matrix.double() - expected).abs() <= bound).all()
    assert torch.equal(x, before)


@DTYPES
@pytest.mark.parametrize("panel", [1, 5, 7, 12])
@pytest.mark.parametrize("experts", [1, 3])
def test_panels_are_mirrored(panel: int, experts: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HessianObserver, "panel", panel)
    x = random(experts, 30, 12, dtype=dtype)
    observer = HessianObserver(12, experts)
    for rows in x.split(10, dim=1):
        observer(rows)
        observer.end_batch()
    for hessian, own in zip(observer.finish(), x, strict=True):
        expected, bound = exact(own)
        assert torch.equal(hessian.matrix, hessian.matrix.T)
        assert ((hessian.matrix.double() - expected).abs() <= bound).all()


@DTYPES
def test_split_into_batches_changes_nothing_but_rounding(dtype: torch.dtype) -> None:
    x = random(211, 40, dtype=dtype)
    expected, bound = exact(x)
    for sizes in ([211], [1, 210], [100, 100, 11], [1] * 211):
        hessian = observe(*x.split(sizes)).finish()[0]
        assert hessian.rows == 211
        assert ((hessian.matrix.double() - expected).abs() <= bound).all()


def test_non_contiguous_input() -> None:
    x = random(33, 60)
    expected, bound = exact(x)
    assert ((observe(x.T.contiguous().T).finish()[0].matrix.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32], ids=["bool", "int64", "fp32"])
@pytest.mark.parametrize("padding", [3.0, float("nan"), float("inf")], ids=["finite", "nan", "inf"])
def test_masked_rows_are_left_out_exactly(kind: torch.dtype, padding: float) -> None:
    x = random(4, 9, 33)
    mask = torch.ones(4, 9, dtype=kind)
    mask[0, 5:] = mask[2, :3] = mask[3] = 0
    x[mask == 0] = padding
    hessian = observe(x, mask=mask).finish()[0]
    expected, bound = exact(x[mask != 0])
    assert hessian.rows == 5 + 9 + 6
    assert hessian.first_bad_batch is None
    assert ((hessian.matrix.double() - expected).abs() <= bound).all()


def test_mask_counts_per_batch() -> None:
    x, mask = random(2, 5, 8), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
    observer = HessianObserver(8)
    observer(x, mask)
    observer(x)
    hessian = observer.finish()[0]
    assert hessian.rows == 6 + 10
    expected, bound = exact(torch.cat([x[mask != 0], x.flatten(0, 1)]))
    assert ((hessian.matrix.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("shape", [(4, 1), (9,), (9, 4), (1, 4, 9)], ids=lambda s: f"{s}")
def test_mask_of_other_leading_size_is_not_used(shape: tuple[int, ...]) -> None:
    x = random(4, 9, 33)
    hessian = observe(x, mask=torch.zeros(shape, dtype=torch.bool)).finish()[0]
    assert hessian.rows == 36
    assert torch.equal(hessian.matrix, observe(x).finish()[0].matrix)


def test_all_rows_masked() -> None:
    hessian = observe(random(2, 3, 8), mask=torch.zeros(2, 3)).finish()[0]
    assert hessian.rows == 0
    assert torch.equal(hessian.matrix, torch.zeros(8, 8))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e20], ids=["nan", "inf", "-inf", "1e20"])
@pytest.mark.parametrize("bad", [0, 2, 4])
def test_first_bad_batch(bad: int, value: float) -> None:
    batches = [random(3, 8, seed=i) for i in range(5)]
    for batch in batches[bad:]:  # later ones too: the first is named
        batch[1, 5] = value
    assert observe(*batches).finish()[0].first_bad_batch == bad


def test_large_finite_activations_are_no_bad_batch() -> None:
    assert observe(torch.full((3, 8), 1e18)).finish()[0].first_bad_batch is None


def test_batches_are_counted_not_calls() -> None:
    observer = HessianObserver(4)
    for batch in range(3):
        for call in range(2):
            x = random(2, 4)
            if (batch, call) == (1, 1):
                x[0, 0] = float("nan")
            observer(x)
        observer.end_batch()
    assert observer.finish()[0].first_bad_batch == 1


def test_finish_starts_anew() -> None:
    observer = observe(torch.full((3, 8), float("nan")))
    assert observer.finish()[0].first_bad_batch == 0
    x = random(5, 8)
    observer(x)
    observer.end_batch()
    hessian = observer.finish()[0]
    assert hessian.rows == 5
    assert hessian.first_bad_batch is None
    assert torch.equal(hessian.matrix, observe(x).finish()[0].matrix)


def test_finish_before_any_call() -> None:
    observer = HessianObserver(8)
    observer.end_batch()
    with pytest.raises(RuntimeError, match="a HessianObserver was never called"):
        observer.finish()[0]
    observer(random(2, 8))
    observer.finish()[0]
    with pytest.raises(RuntimeError, match="a HessianObserver was never called"):
        observer.finish()[0]


def test_results_are_not_shared_between_finishes() -> None:
    observer = observe(random(5, 8))
    first = observer.finish()[0].matrix
    before = first.clone()
    observer(random(5, 8, seed=1))
    observer.finish()[0]
    assert torch.equal(first, before)


@pytest.fixture(params=[torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
def default_dtype(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("default_dtype")
def test_default_dtype_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 8, generator=generator, dtype=torch.float32)
    matrix = observe(x).finish()[0].matrix
    assert matrix.dtype == torch.float32
    expected, bound = exact(x)
    assert ((matrix.double() - expected).abs() <= bound).all()


def test_autocast_does_not_matter() -> None:
    x = random(50, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        matrix = observe(x).finish()[0].matrix
    assert torch.equal(matrix, observe(x).finish()[0].matrix)


def test_keeps_no_autograd_graph_and_no_state() -> None:
    x = random(5, 8).requires_grad_()
    observer = observe(x * 2)
    assert not observer.state_dict()
    assert not list(observer.parameters())
    assert not observer.finish()[0].matrix.requires_grad


@pytest.fixture(params=["tf32", "ieee"])
def flags(request: pytest.FixtureRequest) -> Iterator[str]:
    owners = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    for owner in owners:
        owner.fp32_precision = request.param
    yield request.param
    for owner in owners:
        owner.fp32_precision = "none"


def read_flags() -> list[str]:
    owners = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    return [owner.fp32_precision for owner in owners]


def test_full_precision_inside_and_the_users_choice_after(flags: str) -> None:
    with ieee_fp32():
        assert read_flags() == ["ieee", "ieee"]
    assert read_flags() == [flags, flags]


def test_users_choice_is_restored_after_an_error(flags: str) -> None:
    with pytest.raises(ZeroDivisionError), ieee_fp32():
        raise ZeroDivisionError
    assert read_flags() == [flags, flags]


def test_observer_multiplies_in_full_precision(flags: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    addmm = torch.Tensor.addmm_

    def spy(*args: torch.Tensor) -> torch.Tensor:
        seen.append(read_flags())
        return addmm(*args)

    monkeypatch.setattr(torch.Tensor, "addmm_", spy)
    observe(random(5, 8))
    assert seen == [["ieee", "ieee"]]
    assert read_flags() == [flags, flags]


def test_batches_before_the_first_call_count() -> None:
    observer = HessianObserver(4)
    observer.end_batch()
    observer(torch.full((2, 4), float("nan")))
    observer.end_batch()
    assert observer.finish()[0].first_bad_batch == 1
