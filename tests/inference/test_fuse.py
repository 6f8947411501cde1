"""Projections of one activation as one product."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gptq_ao import fuse_projections_, gptq_config, quantize_, save_quantized, unfuse_projections_
from gptq_ao.errors import CheckpointError
from gptq_ao.tensor import GroupTensor
from gptq_ao.tensor.fused import FusedProjections

from ..models import Attention, seeded, tiny_llama, token_batches


def rounded(model: nn.Module, **settings: Any) -> Any:
    quantize_(model, gptq_config(**{"bits": 4, "group_size": 32, "method": "rtn", **settings}))
    return model


def counted(function: Any) -> tuple[int, Any]:
    """How many products with quantized weights a call makes, and what it returns."""
    seen = 0

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal seen
            seen += func is torch.ops.aten.linear.default or func is torch.ops.gptq_ao.linear.default
            return func(*args, **(kwargs or {}))

    with Count():
        result = function()
    return seen, result


def close(a: Tensor, b: Tensor) -> None:
    """Sums of products in fp32 that may be taken in another order."""
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_language_model_gives_the_same_with_fewer_products() -> None:
    model = rounded(tiny_llama())
    batch = token_batches(1)[0]
    separate, expected = counted(lambda: model(**batch).logits)
    fusion = fuse_projections_(model, batch)
    layer = "model.layers.1."
    assert fusion.fused[2:] == (
        tuple(f"{layer}self_attn.{n}_proj" for n in "qkv"),
        (f"{layer}mlp.gate_proj", f"{layer}mlp.up_proj"),
    )
    assert fusion.left == {}
    together, logits = counted(lambda: model(**batch).logits)
    assert separate - together == 2 * 3  # of 7 products in each of 2 layers, 4 are left
    close(logits, expected)
    ids = batch["input_ids"]
    how: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    tokens = model.generate(ids, **how)
    unfuse_projections_(model)
    assert torch.equal(model.generate(ids, **how), tokens)


@torch.no_grad()
def test_undone_a_model_is_what_it_was() -> None:
    model = rounded(seeded(Attention()))
    names, x = list(model.state_dict()), torch.randn(2, 5, 64)
    expected = model(x)
    parts = {n: p.qdata.clone() for n, p in model.named_parameters() if isinstance(p, GroupTensor)}
    assert fuse_projections_(model, x).fused == (("q", "k", "v"),)
    close(model(x), expected)
    unfuse_projections_(model)
    assert list(model.state_dict()) == names
    assert all(torch.equal(model.get_parameter(n).qdata, qdata) for n, qdata in parts.items())
    assert torch.equal(model(x), expected)


class Projections(nn.Module):
    def __init__(self, *widths: int, bias: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, width, bias=bias) for width in widths)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.layers]


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("act_order", ["group_aware", "group"])
def test_whatever_is_called_in_whatever_order(bias: bool, act_order: str) -> None:
    """Only how much is computed depends on it."""
    calibration = [torch.randn(50, 64, generator=torch.Generator().manual_seed(0))]
    model = seeded(Projections(32, 16, 48, bias=bias))
    rounded(model, method="gptq", act_order=act_order, effort="fast", calibration=calibration)
    x, other = torch.randn(3, 64), torch.randn(4, 64)
    expected = {id(x): model(x), id(other): model(other)}
    fuse_projections_(model, x)
    a, b, c = model.layers
    for layer, index, given in (
        (b, 1, x),
        (b, 1, x),
        (c, 2, other),
        (a, 0, x),
        (c, 2, x),
        (a, 0, other),
        (b, 1, other),
    ):
        close(layer(given), expected[id(given)][index])
    model(x)
    assert model.get_submodule("layers.0.fused")._waiting is None  # nothing is kept once all have been there


@torch.no_grad()
def test_a_copy_and_another_dtype_work() -> None:
    model = rounded(seeded(Projections(32, 32)))
    x = torch.randn(3, 64)
    expected = model(x)
    fuse_projections_(model, x)
    again = copy.deepcopy(model)
    for y, e in zip(again(x), expected, strict=True):
        close(y, e)
    half = again.to(torch.bfloat16)
    assert [y.dtype for y in half(x.bfloat16())] == [torch.bfloat16] * 2
    assert len({id(m) for m in again.modules() if isinstance(m, FusedProjections)}) == 1


def test_what_is_not_alike_stays_apart() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.four, self.also, self.eight, self.dense = (nn.Linear(64, 32) for _ in range(4))
            self.odd = nn.Linear(64, 24)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([m(x) for m in (self.four, self.also, self.eight, self.dense, self.odd)], -1)

    x = torch.randn(3, 64)
    model = rounded(seeded(Mixed()), rules={"eight.weight": {"bits": 8}, "dense.weight": None})
    expected = model(x)
    fusion = fuse_projections_(model, x)
    assert fusion.fused == (("four", "also"),)
    assert fusion.left == {
        "eight": "no other layer with its activation has such a weight",
        "dense": "it is not quantized",
        "odd": "its 24 output features are not a multiple of 16",
    }
    close(model(x), expected)


def test_an_activation_that_changes_in_between_is_another_one() -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 32), nn.Linear(64, 32)

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            y = self.a(x)
            x.add_(1)
            return y + self.b(x)

    x = torch.randn(3, 64)
    model = rounded(seeded(Changing()))
    expected = model(x)
    assert fuse_projections_(model, x).fused == ()
    assert torch.equal(model(x), expected)


def test_a_layer_in_two_places_stays() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(self.b(x)) + self.a(x)

    assert fuse_projections_(rounded(seeded(Twice())), torch.randn(3, 64)).fused == ()


@torch.no_grad()
def test_a_compiled_model_has_one_graph_and_fewer_products() -> None:
    model = rounded(seeded(Attention()))
    x = torch.randn(2, 5, 64)
    expected = model(x)
    fuse_projections_(model, x)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append([n for n in graph.graph.nodes if n.target is torch.nn.functional.linear])
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    close(compiled(x), expected)
    close(compiled(torch.cat([x, x, x])), torch.cat([expected] * 3))
    assert [len(products) for products in graphs] == [2]  # q, k and v; out


def test_a_fused_model_is_not_saved(tmp_path: Path) -> None:
    model = rounded(seeded(Attention()))
    fuse_projections_(model, torch.randn(2, 5, 64))
    for form in ("native", "gptq", "dense"):
        with pytest.raises(CheckpointError, match=r"'q.fused' is a fused.*unfuse_projections_\(model\) first"):
            save_quantized(model, tmp_path / "saved", format=form)
    assert not (tmp_path / "saved").exists()
