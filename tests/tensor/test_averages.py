"""Moving averages of models: quantized weights do not move, so their averages are what they are."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from gptq_ao import gptq_config, quantize_
from gptq_ao.tensor import GroupTensor
from tests.models import seeded


def model(seed: int = 0) -> Any:
    made = seeded(nn.Sequential(nn.Linear(64, 40), nn.Linear(40, 8)), seed)
    quantize_(made, gptq_config(4, 32, method="rtn", rules={"1": None}))
    return made


WAYS: dict[str, dict[str, Any]] = {
    "mean": {},
    "mean of lists": {"multi_avg_fn": get_swa_multi_avg_fn()},
    "exponential": {"avg_fn": get_ema_avg_fn(0.5)},
    "exponential of lists": {"multi_avg_fn": get_ema_multi_avg_fn(0.5)},
}


@pytest.mark.parametrize("way", WAYS)
def test_averaged_model(way: str) -> None:
    trained = model()
    averaged: Any = AveragedModel(trained, **WAYS[way])
    start = copy.deepcopy(trained[1].weight)
    averaged.update_parameters(trained)
    for _ in range(2):
        with torch.no_grad():
            trained[1].weight.add_(1)
        averaged.update_parameters(trained)
    weight = averaged.module[0].weight
    assert isinstance(weight, GroupTensor)
    assert torch.equal(weight.codes(), trained[0].weight.codes())
    # Three values, 0, 1, 2 above the start: their mean, or halves of the way to each.
    expected = start + (1 if "mean" in way else 1.25)
    torch.testing.assert_close(averaged.module[1].weight, expected)


BY_HAND: dict[str, Callable[[Any, Any], Any]] = {
    "lerp_": lambda a, b: [x.lerp_(y, 0.5) for x, y in zip(a, b, strict=True)],
    "lerp_ by a tensor": lambda a, b: [x.lerp_(y, torch.tensor(0.5)) for x, y in zip(a, b, strict=True)],
    "foreach": lambda a, b: torch._foreach_lerp_(a, b, 0.5),
    "copy_": lambda a, b: [x.copy_(x * 0.5 + y * 0.5) for x, y in zip(a, b, strict=True)],
}


@pytest.mark.parametrize("way", BY_HAND)
@torch.no_grad()
def test_by_hand(way: str) -> None:
    average, trained = model(), model()
    trained[1].weight.add_(1)
    expected = average[1].weight + 0.5
    BY_HAND[way](list(average.parameters()), list(trained.parameters()))
    torch.testing.assert_close(average[1].weight, expected)
    assert torch.equal(average[0].weight, trained[0].weight)


@pytest.mark.parametrize("way", BY_HAND)
@torch.no_grad()
def test_other_codes_have_no_average(way: str) -> None:
    average, other = model(), model(seed=1)
    before = average[0].weight.dequantize()
    error = ValueError if way == "copy_" else NotImplementedError
    with pytest.raises(error, match=r"cannot (change|copy)"):
        BY_HAND[way](list(average.parameters()), list(other.parameters()))
    assert torch.equal(average[0].weight.dequantize(), before)
