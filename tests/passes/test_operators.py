"""The table of operators: it names what torch has, and each pass treats all members of a set alike."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from gptq_ao import gptq_config, quantize_
from gptq_ao.calibration.batches import Batch, as_batch
from gptq_ao.passes.canonicalize import canonicalize
from gptq_ao.passes.capture import capture
from gptq_ao.passes.find_linears import find_linears
from gptq_ao.passes.products import operators
from gptq_ao.passes.products.operators import ASSERTIONS, CASTS, COPIES, GATHERS, RESHAPES, RESIZES, gathered, op_name
from gptq_ao.passes.products.residual_stream import added_to
from gptq_ao.passes.products.table import MULTIPLYING, bias_of
from gptq_ao.passes.records import Program
from gptq_ao.passes.replay.find_products import ProductFinder
from gptq_ao.passes.replay.padding import Padding
from gptq_ao.passes.replay.products import Parameters, operator_name
from gptq_ao.tensor import GroupTensor

from ..models import seeded

aten = torch.ops.aten
SETS = {name: s for name, s in vars(operators).items() if name.isupper()} | {"MULTIPLYING": MULTIPLYING}


@pytest.mark.parametrize("name", SETS)
def test_every_operator_exists(name: str) -> None:
    for operator in SETS[name]:
        namespace, _, short = operator.rpartition("::")
        if namespace == "aten":
            assert getattr(aten, short).overloads(), operator
        elif not namespace:
            assert callable(getattr(torch, short)), operator
        else:  # another library registers it
            assert operator == "transformers::grouped_mm_fallback"


def test_no_operator_is_in_two_sets() -> None:
    assert len(SETS) == 12
    for (a, first), (b, second) in itertools.combinations(SETS.items(), 2):
        assert not first & second, (a, b)


Operator = Callable[[Tensor, Tensor], Tensor]
# How a model spells them: x, and a tensor of the same shape and dtype that some look at → x.
SPELLED: dict[str, Operator] = {
    "aten::_to_copy": lambda x, y: aten._to_copy.default(aten._to_copy.default(x, dtype=torch.double), dtype=x.dtype),
    "aten::_unsafe_view": lambda x, y: aten._unsafe_view.default(x, y.shape),
    "aten::alias": lambda x, y: aten.alias.default(x),
    "aten::clone": lambda x, y: x.clone(),
    "aten::contiguous": lambda x, y: aten.contiguous.default(x),
    "aten::detach": lambda x, y: x.detach(),
    "aten::flatten": lambda x, y: x.flatten(0, 1).view(y.shape),
    "aten::lift_fresh_copy": lambda x, y: aten.lift_fresh_copy.default(x),
    "aten::ravel": lambda x, y: x.ravel().view(y.shape),
    "aten::reshape": lambda x, y: x.reshape(-1, y.shape[-1]).reshape(y.shape),
    "aten::reshape_as": lambda x, y: x.flatten(0, 1).reshape_as(y),
    "aten::squeeze": lambda x, y: x.unsqueeze(0).squeeze(0),
    "aten::to": lambda x, y: x.double().to(y),
    "aten::type_as": lambda x, y: x.double().type_as(y),
    "aten::unflatten": lambda x, y: x.unflatten(0, (-1, 1)).flatten(0, 1),
    "aten::unsqueeze": lambda x, y: x.unsqueeze(0).squeeze(0),
    "aten::view": lambda x, y: x.view(-1, y.shape[-1]).view(y.shape),
    "aten::view_as": lambda x, y: x.flatten(0, 1).view_as(y),
}
KEPT = COPIES | RESHAPES | CASTS


def captured(model: nn.Module, *inputs: Tensor) -> Program:
    return capture(seeded(model), as_batch(inputs))


def names(program: Program) -> set[str]:
    return {op_name(n) for n in program.graph.nodes if n.op == "call_function"}


def nodes(program: Program, target: Any) -> list[fx.Node]:
    return program.graph.find_nodes(op="call_function", target=target)


class Apart(nn.Module):
    """One activation, read through each of the operators by a linear of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in SPELLED)

    def forward(self, x: Tensor) -> Tensor:
        x = x.tanh()
        read = [layer(f(x, x)) for layer, f in zip(self.layers, SPELLED.values(), strict=True)]
        return torch.stack(read).sum(0)


def test_every_copy_and_reshape_leads_back_to_one_activation() -> None:
    program = captured(Apart(), torch.ones(2, 4, 8))
    # lift_fresh is of constants only. (Nor does export leave a copy that is none.)
    assert names(program) >= KEPT - {"aten::lift_fresh", "aten::contiguous"}
    sites, _ = find_linears(program)
    value = {name: s.rows[0].value for name, s in zip(SPELLED, sites, strict=True)}
    # Casts round, and what ravel gives has no rows.
    apart = {"aten::ravel", *CASTS}
    assert {v for name, v in value.items() if name not in apart} == {"tanh"}
    assert all(value[name] != "tanh" for name in apart)


class Through(nn.Module):
    """One weight for each of the operators, which lies between it and its product."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.zeros(4, 8) for _ in SPELLED)
        self.like = nn.Parameter(torch.zeros(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        weights = [f(w, self.like) for w, f in zip(self.weights, SPELLED.values(), strict=True)]
        return torch.stack([F.linear(x, w) for w in weights]).sum(0)


def test_every_weight_is_found_through_them() -> None:
    program = captured(Through(), torch.ones(2, 8))
    assert names(program) >= KEPT - {"aten::lift_fresh", "aten::contiguous"}
    sites, excluded = find_linears(program)
    assert [s.weight for s in sites] == [f"weights.{i}" for i in range(len(SPELLED))]
    assert {s.part for s in sites} == {(0, 4)}
    assert [e.weight for e in excluded] == ["like"]


class Added(nn.Module):
    """One layer for each of the operators, which lies between it and the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in SPELLED)

    def forward(self, x: Tensor) -> Tensor:
        for layer, f in zip(self.layers, SPELLED.values(), strict=True):
            x = x.tanh()
            x = x + f(layer(x.relu()), x)
        return x


def test_every_product_is_followed_through_them_to_the_sum() -> None:
    program = captured(Added(), torch.ones(2, 4, 8))
    for check in [n for n in program.graph.nodes if op_name(n) in ASSERTIONS]:
        program.graph.erase_node(check)  # canonicalize would erase copies as well
    streams = [added_to(n) for n in nodes(program, aten.linear.default)]
    assert dict(zip(SPELLED, streams, strict=True)) == dict(
        zip(SPELLED, nodes(program, aten.tanh.default), strict=True)
    )


class Idle(nn.Module):
    """Each operator in a form that does nothing, once; and in one that does something, but for those that never do."""

    def forward(self, x: Tensor) -> Any:  # [B, 4, 8]
        y, strided = x.tanh(), x.transpose(0, 1)
        idle = [
            *(aten.alias.default(y), y.clone(), y.detach(), aten.lift_fresh_copy.default(y)),
            *(aten._to_copy.default(y), y.to(y.dtype), y.type_as(x), aten._unsafe_view.default(y, x.shape)),
            *(y.reshape(x.shape), y.reshape_as(x), y.squeeze(1), y.view(x.shape), y.view_as(x), y.flatten(2)),
            *(y.expand(x.shape), y.expand_as(x), y.broadcast_to(x.shape), y[:, 0:4], y.narrow(1, 0, 4)),
        ]
        busy = [
            strided.to(x.dtype, memory_format=torch.contiguous_format),  # a later view may rely on it
            *(strided.clone(memory_format=torch.contiguous_format), strided.contiguous(), y.to(torch.double)),
            *(
                y.type_as(y.double()),
                y.flatten(1),
                y.unsqueeze(0),
                y.narrow(1, 0, 2),
                y[:, 1:],
                y[:, :1].expand(x.shape),
            ),
        ]
        return [v * 2 for v in idle], [v * 3 for v in busy]


def test_what_does_nothing_goes_and_the_rest_stays() -> None:
    model, x = Idle(), torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
    before = capture(model, as_batch(x))
    program = canonicalize(before)
    (y,) = nodes(program, aten.tanh.default)
    doubled, tripled = ([n for n in nodes(program, aten.mul.Tensor) if n.args[1] == k] for k in (2, 3))
    assert {n.args[0] for n in doubled} == {y}
    assert len(doubled) == 19
    assert len({n.args[0] for n in tripled} - {y}) == len(tripled) == 10
    assert names(before) >= (COPIES | CASTS | RESIZES) - {"aten::lift_fresh"}
    assert all(torch.equal(a, b) for a, b in zip(program.module(x), before.module(x), strict=True))


def test_a_weight_that_takes_the_dtype_of_its_activation_is_quantized_and_runs() -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            x = F.linear(x, self.a.weight.type_as(x), self.a.bias.type_as(x))
            return F.linear(x.relu(), self.b.weight.to(x), self.b.bias.to(x))

    model, x = seeded(Cast()).bfloat16(), torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    report = quantize_(model, gptq_config(4, 32, calibration=[x]))
    assert report is not None
    assert (report.capture, len(report.weights)) == ("export", 2)
    dense = Cast()
    for name, p in model.named_parameters():
        dense.get_parameter(name).data.copy_(p.float().dequantize() if isinstance(p, GroupTensor) else p)
    assert isinstance(model.a.weight, GroupTensor)
    with torch.no_grad():
        assert torch.allclose(model(x), dense(x), atol=1e-5)  # both compute in fp32


def test_a_view_of_a_copy_in_another_order_is_listed() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.w = nn.Linear(8, 8), nn.Parameter(torch.zeros(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) + x @ self.w.t().contiguous().view(4, 16).view(8, 8)

    sites, excluded = find_linears(captured(Odd(), torch.ones(2, 8)))
    assert [s.weight for s in sites] == ["linear.weight"]
    assert [(e.weight, e.expected) for e in excluded] == [("w", False)]
    assert excluded[0].reason.startswith("aten::matmul multiplies by what aten::t makes of it")


def test_a_part_that_data_selects_is_listed_through_any_view_and_cast() -> None:
    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.a, self.b = nn.Parameter(torch.zeros(4, 8, 16)), nn.Parameter(torch.zeros(4, 8, 8))
            self.table = nn.Parameter(torch.zeros(4, 8))  # rows of it are activations

        def forward(self, x: Tensor, which: Tensor) -> Tensor:  # [B, 1, 8], [B]
            x = x + self.linear(self.table[which].to(x.dtype))[:, None]
            x = torch.bmm(self.linear(x), self.a[which][:, :, 8:].to(x.dtype))
            return torch.bmm(x, self.b.double().index_select(0, which).mT.type_as(x))

    sites, excluded = find_linears(captured(Chosen(), torch.ones(2, 1, 8), torch.zeros(2, dtype=torch.long)))
    assert {s.weight for s in sites} == {"linear.weight"}
    assert [(e.weight, e.expected) for e in excluded] == [("a", False), ("b", False), ("table", True)]


def test_rows_that_are_gathered_either_way() -> None:
    class Gathers(nn.Module):
        def forward(self, x: Tensor, which: Tensor) -> Any:  # [B, 2], [N]
            rows = x[which] + x.index_select(0, which) + x.index_select(-2, which)
            return rows, x.index_select(1, which), x[which[None]], x[x[:, 0] > 0]

    program = capture(Gathers(), as_batch((torch.ones(3, 2), torch.zeros(4, dtype=torch.long))))
    x, which = (program.placeholders[name] for name in program.inputs if name is not None)
    found = [gathered(n) for n in program.graph.nodes if op_name(n) in GATHERS]
    assert found == [(x, which)] * 3 + [None] * 3
    assert gathered(x) is None


def test_a_bias_is_what_a_product_is_added_to() -> None:
    graph = fx.Graph()
    x, w, b = (graph.placeholder(name) for name in "xwb")
    calls: list[tuple[Any, Any, Any]] = [
        (aten.linear.default, (x, w, b), {}),
        (aten.linear.default, (x, w), {"bias": b}),
        (aten.conv1d.default, (x, w, b), {}),
        (aten._grouped_mm.default, (x, w), {"bias": b}),
        (aten.addmm.default, (b, x, w), {}),
        (aten.baddbmm.default, (b, x, w), {}),
    ]
    assert [bias_of(graph.call_function(*call)) for call in calls] == [b] * len(calls)
    assert bias_of(graph.call_function(aten.linear.default, (x, w))) is None
    assert bias_of(graph.call_function(aten.mm.default, (x, w))) is None


def test_a_replay_knows_functions_as_the_operators_that_they_are() -> None:
    spelled = {
        "aten::topk": (torch.topk, Tensor.topk, aten.topk.default),
        "aten::embedding": (F.embedding, torch.embedding),
        "aten::embedding_bag": (F.embedding_bag, torch.embedding_bag),
        "aten::index": (Tensor.__getitem__, aten.index.Tensor),
        "aten::index_select": (torch.index_select, Tensor.index_select),
        "aten::scaled_dot_product_attention": (F.scaled_dot_product_attention,),
        "aten::matmul": (torch.matmul, Tensor.matmul, Tensor.__matmul__),
        "aten::_grouped_mm": (F.grouped_mm, torch._grouped_mm),
        "": (torch.relu, Tensor.__index__),
    }
    assert {name: {operator_name(f) for f in functions} for name, functions in spelled.items()} == {
        name: {name} for name in spelled
    }


def test_a_replay_finds_what_grouped_mm_multiplies() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(2, 8, 16))

        def forward(self, x: Tensor) -> Tensor:
            return F.grouped_mm(x, self.w, offs=torch.tensor([3, 5], dtype=torch.int32))

    model, x = seeded(Experts()).bfloat16(), torch.ones(5, 8, dtype=torch.bfloat16)
    finder = ProductFinder(Parameters(model))
    finder.start_batch(Batch((x,), {}))
    with finder, torch.no_grad():
        model(x)
    finder.end_batch()
    (site,) = finder.sites()
    assert (site.weight, site.part, site.experts, site.layout.transposed) == ("w", (0, 32), 2, True)


def test_a_replay_takes_selected_features_for_no_rows() -> None:
    tokens = torch.ones(6, 4)
    padding = Padding(Batch((), {"attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}))
    rows, which = tokens.index_select(0, torch.tensor([2, 3])), torch.tensor([0, 1])
    padding.follow(Tensor.index_select, (tokens, 0, torch.tensor([2, 3])), rows)
    features = rows.index_select(1, which)
    padding.follow(Tensor.index_select, (rows, 1, which), features)
    for x in (rows, features):
        mask = padding.of(x)
        assert mask is not None
        assert mask.tolist() == [0, 1]
