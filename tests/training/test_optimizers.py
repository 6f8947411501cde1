"""Optimizers that are given all parameters of a model, and data loaders' processes that have it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from gptq_ao import gptq_config, quantize_
from tests.models import seeded


def two_layers() -> nn.Sequential:
    """The first is quantized, the second trains, and so does a bias."""
    model: nn.Sequential = seeded(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16, bias=False)))
    quantize_(model, gptq_config(4, 32, method="rtn"), filter_fn=lambda module, name: name == "0")
    return model


def eight_bit(parameters: Any) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit

    return AdamW8bit(parameters, lr=1e-2)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, 1e-2, foreach=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, 1e-2, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, 1e-1, momentum=0.9, weight_decay=0.1, foreach=True),
    "Adafactor": lambda p: torch.optim.Adafactor(p, 1e-1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 1e-3),
    "Muon": lambda p: torch.optim.Muon([t for t in p if t.dim() == 2], 1e-2),
    "torchao's AdamW8bit": eight_bit,
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.long if n.startswith("torchao") else ()) for n in OPTIMIZERS]
)
def test_an_optimizer_of_all_parameters_leaves_quantized_ones_alone(name: str) -> None:
    model = two_layers()
    weight: Any = model[0].weight
    before = weight.dequantize().clone()
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    x, y = torch.randn(2, 32, 64, generator=torch.Generator().manual_seed(0)).unbind()
    y = y[:, :16]
    losses = []
    for _ in range(8):
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert torch.equal(weight.dequantize(), before)
    assert weight not in optimizer.state
    OPTIMIZERS[name](list(model.parameters())).load_state_dict(optimizer.state_dict())


class Embedded(Dataset[Tensor]):
    """A dataset that has the model, as those that tokenize or embed have."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __len__(self) -> int:
        return 4

    @torch.no_grad()
    def __getitem__(self, index: int) -> Tensor:
        torch.set_num_threads(1)
        found: Tensor = self.model(torch.full((1, 64), float(index)))
        return found[0]


@pytest.mark.parametrize(
    "start", ["fork", *(pytest.param(start, marks=pytest.mark.long) for start in ("forkserver", "spawn"))]
)
def test_workers_of_a_data_loader_have_the_weight(start: str) -> None:
    model = two_layers()
    expected = torch.stack([Embedded(model)[i] for i in range(4)]).detach()
    loader = DataLoader(Embedded(model), batch_size=2, num_workers=2, multiprocessing_context=start)
    assert torch.equal(torch.cat(list(loader)), expected)
