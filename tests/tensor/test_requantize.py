"""`nearest`: other values in the form of a quantized weight."""

from typing import Any

import pytest
import torch
from torch import Tensor

from gptq_ao.codes.grid import choose_grid, round_to_grid
from gptq_ao.errors import NonFiniteError
from gptq_ao.tensor import GroupTensor, tensor_class
from gptq_ao.tensor.requantize import nearest

FORMS: dict[str, dict[str, Any]] = {
    "matrix": {},
    "order of columns": {"permuted": True},
    "transposed": {"transposed": True},
    "transposed, in an order": {"transposed": True, "permuted": True},
    "convolution": {"shape": (5, 48), "view_shape": (5, 12, 2, 2)},
    "stack": {"shape": (3, 5, 48)},
    "transposed stack": {"shape": (2, 3, 5, 48), "transposed": True},
    "one row": {"shape": (1, 48)},
    "groups of one": {"group": 1},
    "one group": {"group": 48},
    "bf16": {"dtype": torch.bfloat16},
}
FORM = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def weight(
    shape: tuple[int, ...] = (5, 48),
    *,
    bits: int = 4,
    group: int = 16,
    permuted: bool = False,
    dtype: torch.dtype = torch.float32,
    sym: bool = False,
    **form: Any,
) -> GroupTensor:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator)
    scale, zero_point = choose_grid(values, group, bits, sym)
    steps, zeros = (t.float().repeat_interleave(group, -1) for t in (scale, zero_point))
    codes = round_to_grid(values, steps, zeros, bits).to(torch.uint8)
    perm = torch.randperm(shape[-1], generator=generator) if permuted else None
    return tensor_class(bits).from_codes(codes, scale, zero_point, dtype=dtype, perm=perm, **form)


def kind(w: GroupTensor) -> tuple[Any, ...]:
    names, attributes = w.__tensor_flatten__()
    return type(w), w.shape, w.stride(), names, attributes


def by_groups(w: GroupTensor, values: Tensor) -> Tensor:
    """Values of the shape of `w` as [..., out, groups, columns], in the order of its codes."""
    matrix = (w.in_features, w.out_features) if w.transposed else (w.out_features, w.in_features)
    rows = values.float().reshape(*w.qdata.shape[:-3], *matrix)
    rows = rows.mT if w.transposed else rows
    return (rows if w.perm is None else rows[..., w.perm.long()]).unflatten(-1, (-1, w.group_size))


@FORM
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_same_values_keep_their_codes(form: dict[str, Any], bits: int) -> None:
    w = weight(bits=bits, **form)
    again = nearest(w, w.dequantize())
    assert kind(again) == kind(w)
    assert torch.equal(again.dequantize(), w.dequantize())
    if (bits, w.dtype) != (8, torch.bfloat16):  # where two codes may stand for one value
        assert all(torch.equal(a, b) for a, b in zip(again.parts().values(), w.parts().values(), strict=True))


@FORM
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [0.01, 3.0], ids=["within the grid", "beyond it"])
def test_no_group_is_further_off_than_by_rounding_to_nearest(form: dict[str, Any], bits: int, size: float) -> None:
    w = weight(bits=bits, **form)
    values = w.dequantize() + size * torch.randn(w.shape, generator=torch.Generator().manual_seed(1)).to(w.dtype)
    new = nearest(w, values)
    assert kind(new) == kind(w)
    wanted = by_groups(w, values)
    scale, _ = choose_grid(wanted.flatten(-2), w.group_size, bits, sym=False)
    # Half a step for each value, and what the rounded zero point and scale may cut off at the ends; the result itself
    # is rounded to the weight's dtype.
    step = scale.float() * (1 + 2**-10)
    error = (by_groups(w, new.dequantize()) - wanted).norm(dim=-1)
    rounding = torch.finfo(w.dtype).eps * wanted.norm(dim=-1)
    assert (error <= step * w.group_size**0.5 + rounding).all()
    kept = by_groups(w, w.dequantize())
    assert (error <= (kept - wanted).norm(dim=-1) + step + rounding).all()


def test_a_group_keeps_the_grid_that_is_closer() -> None:
    w = weight((1, 32))
    values = w.dequantize().clone()
    values[0, 16:] *= 3  # of two groups only one no longer fits
    new = nearest(w, values)
    assert torch.equal(new.codes()[0, :16], w.codes()[0, :16])
    assert new.scale[0, 0] == w.scale[0, 0]
    assert new.scale[0, 1] > 2.5 * w.scale[0, 1]
    assert (new.dequantize() - values)[0, 16:].abs().max() <= new.scale[0, 1] * 0.51


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_symmetric_weight_stays_symmetric(bits: int) -> None:
    w = weight(bits=bits, sym=True)
    new = nearest(w, w.dequantize() + 2)  # of one sign: an asymmetric grid would be closer
    assert (new.zero_point == 2 ** (bits - 1)).all()
    assert (new.scale > 0).all()


def test_values_of_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are rounded some rows at a time, which changes nothing."""
    w = weight((7, 48))
    values = w.dequantize() * 1.3
    expected = nearest(w, values)
    monkeypatch.setattr("gptq_ao.tensor.requantize.CHUNK", 100)
    assert torch.equal(nearest(w, values).qdata, expected.qdata)


def test_values_that_are_not_contiguous() -> None:
    w = weight((48, 48), group=16)
    values = torch.randn(48, 48, generator=torch.Generator().manual_seed(1))
    assert torch.equal(nearest(w, values.T).qdata, nearest(w, values.T.contiguous()).qdata)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e9])
def test_values_without_a_grid(value: float) -> None:
    w = weight()
    values = w.dequantize().clone()
    values[2, 3] = value
    with pytest.raises(NonFiniteError, match="a scale for them is not a finite fp16 number"):
        nearest(w, values)
