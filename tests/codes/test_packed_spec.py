import pytest
import torch

from gptq_ao.codes.packed_spec import PackedSpec
from gptq_ao.recipe import Recipe
from gptq_ao.tensor import GroupTensor, tensor_class

SHAPES = [(32, 64), (33, 96), (1, 32), (3, 16, 64), (2, 5, 96)]


def weight(shape: tuple[int, ...], recipe: Recipe) -> GroupTensor:
    spec = PackedSpec.of(shape, recipe)
    codes = torch.zeros(spec.shape, dtype=torch.uint8)
    scale, zero_point = torch.ones(spec.grid_shape).half(), torch.zeros(spec.grid_shape, dtype=torch.uint8)
    perm = torch.arange(shape[-1], dtype=torch.int32) if spec.permuted else None
    return tensor_class(spec.bits).from_codes(codes, scale, zero_point, dtype=torch.bfloat16, perm=perm)


@pytest.mark.parametrize("act_order", ["none", "group"])
@pytest.mark.parametrize("group_size", [16, 32, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_what_the_weight_will_be(shape: tuple[int, ...], bits: int, group_size: int, act_order: str) -> None:
    recipe = Recipe(bits, group_size, act_order=act_order)
    spec = PackedSpec.of(shape, recipe)
    packed = weight(shape, recipe)
    assert packed.spec == spec
    assert spec.group_size == packed.group_size == (shape[-1] if group_size == -1 else group_size)
    assert spec.stacked == (packed.dim() > 2)
    assert spec.grid_shape == packed.scale.shape
    assert spec.nbytes == sum(getattr(packed, name).nbytes for name in packed.__tensor_flatten__()[0])


def test_only_gptq_permutes() -> None:
    """Rounding to nearest has no order."""
    assert PackedSpec.of((32, 64), Recipe(act_order="group")).permuted
    assert not PackedSpec.of((32, 64), Recipe(act_order="group", method="rtn")).permuted
