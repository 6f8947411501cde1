"""FlopCounterMode counts products with quantized weights as those with dense ones."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gptq_ao import gptq_config, quantize_
from tests.models import seeded


def count(weight: Tensor, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        nn.functional.linear(x, weight).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("shape", [(5, 64), (1, 64), (2, 3, 64), (300, 64)])
def test_a_product_and_its_gradient(shape: tuple[int, ...]) -> None:
    layer = seeded(nn.Linear(64, 40, bias=False)).requires_grad_(False)
    dense = copy.deepcopy(layer.weight)
    quantize_(layer, gptq_config(4, 32, method="rtn"))
    found = [count(weight, torch.ones(shape, requires_grad=True)) for weight in (layer.weight, dense)]
    rows = torch.Size(shape[:-1]).numel()
    assert found == [2 * 2 * rows * 64 * 40] * 2


def test_experts() -> None:
    """Every row is multiplied by one expert."""
    layer = seeded(nn.Linear(64, 40, bias=False))
    quantize_(layer, gptq_config(4, 32, method="rtn"))
    stack: Any = torch.stack([layer.weight.detach()] * 3)
    x = torch.ones(10, 64, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        offsets = torch.tensor([2, 5, 10], dtype=torch.int32)
        torch.ops.gptq_ao.grouped_linear(x, *stack.packed(), offsets).sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 10 * 64 * 40
