"""Tensor parallelism (DTensor) on quantized weights: parts stay packed, and the results are those of one process."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from gptq_ao import gptq_config, quantize_
from gptq_ao.tensor import GroupTensor
from tests.models import seeded, tiny_llama, token_batches
from tests.ranks import device, on_ranks, outcomes


def mesh(ranks: int = 2) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device(), (ranks,))


class Mlp(nn.Module):
    """Two layers, one cut by rows and one by columns, with biases."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def mlp(**settings: Any) -> Mlp:
    model = seeded(Mlp(64, 256)).to(settings.pop("dtype", torch.float32))
    quantize_(model, gptq_config(**{"bits": 4, "group_size": 32, "method": "rtn", **settings}))
    return model.to(device())


def local(parameter: Any) -> GroupTensor:
    part = parameter._local_tensor
    assert isinstance(part, GroupTensor)
    return part


def both_ways(settings: dict[str, Any], src_data_rank: int | None) -> None:
    model = mlp(**settings)
    dtype = settings.get("dtype", torch.float32)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).to(device(), dtype).requires_grad_()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    y = model(x)
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    parallelize_module(model, mesh(), plan, src_data_rank=src_data_rank)
    assert local(model.up.weight).shape == (128, 64)
    assert local(model.down.weight).shape == (64, 128)
    z = model(x)
    (dz,) = torch.autograd.grad(z.square().sum(), x)
    # Two partial sums are added, in the dtype.
    close: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.1}
    torch.testing.assert_close(z, y, **close)
    torch.testing.assert_close(dz, dx, **close)
    for name, parameter in model.named_parameters():
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        assert isinstance(whole, GroupTensor) == isinstance(before[name], GroupTensor)
        assert torch.equal(whole, before[name])


@pytest.mark.parametrize(
    ("settings", "src_data_rank"),
    [
        ({}, 0),
        ({"bits": 2}, None),
        ({"bits": 3}, 0),
        ({"bits": 8}, None),
        ({"dtype": torch.bfloat16}, 0),
        ({"group_size": -1}, None),
    ],
    ids=str,
)
def test_rows_and_columns(settings: dict[str, Any], src_data_rank: int | None) -> None:
    """Also a scale per row (`group_size=-1`), which all parts of the row share."""
    on_ranks(both_ways, settings, src_data_rank)


def sequence_parallel() -> None:
    """The activations are cut along the sequence between the layers, too; and one graph has it all."""
    import torch.distributed as dist

    model, rank = mlp(), dist.get_rank()
    x = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0)).to(device())
    y = model(x)
    parallelize_module(
        model,
        mesh(),
        {"up": ColwiseParallel(input_layouts=Shard(1)), "down": RowwiseParallel(output_layouts=Shard(1))},
    )
    part = x.chunk(2, 1)[rank].contiguous()
    torch.testing.assert_close(model(part), y.chunk(2, 1)[rank], rtol=1e-4, atol=1e-5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(part), y.chunk(2, 1)[rank], rtol=1e-4, atol=1e-5)


def test_sequence_parallel_and_compiled() -> None:
    on_ranks(sequence_parallel)


def whole_model() -> None:
    model = tiny_llama(width=128, layers=2)
    quantize_(model, gptq_config(4, 32, effort="fast", act_order="none", calibration=token_batches(2)))
    model, ids = model.to(device()), token_batches(1)[0]["input_ids"].to(device())
    with torch.no_grad():
        expected = model(ids).logits
        for layer in model.model.layers:
            rows = [*(f"self_attn.{n}_proj" for n in "qkv"), "mlp.gate_proj", "mlp.up_proj"]
            plan: dict[str, Any] = {name: ColwiseParallel() for name in rows}
            plan |= {name: RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")}
            parallelize_module(layer, mesh(), plan)
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_llama() -> None:
    on_ranks(whole_model)


def uneven(rows: int, columns: int, act_order: bool, style: str) -> None:
    model = nn.Sequential(nn.Linear(columns, rows, bias=False))
    settings: dict[str, Any] = (
        {"calibration": [torch.randn(32, columns)], "act_order": "group"} if act_order else {"method": "rtn"}
    )
    quantize_(model, gptq_config(4, 32, **settings))
    parallelize_module(model, mesh(), {"0": ColwiseParallel() if style == "rows" else RowwiseParallel()})


@pytest.mark.parametrize(
    ("rows", "columns", "act_order", "style", "why"),
    [
        (40, 64, False, "rows", "codes lie in tiles of 16 output features, and a part would have 20"),
        (31, 64, False, "rows", "31 is no multiple of 2"),
        (64, 96, False, "columns", "codes lie in tiles of 64 input features, and a part would have 48"),
        (64, 128, True, "columns", "its input features are in an order of their own"),
    ],
)
def test_what_cannot_be_cut_is_refused_on_every_rank(
    rows: int, columns: int, act_order: bool, style: str, why: str
) -> None:
    for found in outcomes(uneven, rows, columns, act_order, style, seconds=40):
        assert found.error is not None
        assert f"shape=({rows}, {columns})" in found.error
        assert why in found.error


def experts() -> None:
    """Expert parallelism: a stack is cut between its matrices; with other placements and back again."""
    weight = nn.Parameter(
        torch.stack([mlp().up.weight.detach(), *(mlp(bits=4).up.weight.detach() for _ in range(3))]),
        requires_grad=False,
    )
    assert isinstance(weight, GroupTensor)
    placed = distribute_tensor(weight, mesh(), [Shard(0)])
    assert local(placed).shape == (2, 256, 64)
    assert torch.equal(placed.full_tensor(), weight)
    rows = placed.redistribute(placements=[Shard(1)])
    assert local(rows).shape == (4, 128, 64)
    assert torch.equal(rows.full_tensor(), weight)
    copied = distribute_tensor(weight, mesh(), [Replicate()])
    assert torch.equal(local(copied), weight)


def test_experts() -> None:
    on_ranks(experts)
