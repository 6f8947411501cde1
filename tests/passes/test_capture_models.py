"""What torch modules do in a forward: each is captured, and its graph computes what the module does, bit for bit."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from gptq_ao.calibration.batches import Batch, as_batch
from gptq_ao.passes.canonicalize import canonicalize
from gptq_ao.passes.capture import calibration_mode, capture
from gptq_ao.passes.records import Program

from ..models import seeded

aten = torch.ops.aten
CASES: dict[str, tuple[Callable[[], nn.Module], Any]] = {}
TRACED_TWICE = {"autocast", "branch_by_torch_cond", "write_seen_through_another_view", "write_through_a_reshape"}


def rows(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)


def case(
    name: str, *args: Any, base: Callable[[], nn.Module] = Two, **kwargs: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A module made of a base and the decorated forward, with its inputs (by default five rows of 8)."""

    def register(forward: Callable[..., Any]) -> Callable[..., Any]:
        def build() -> nn.Module:
            model = base()
            model.__class__ = type(name, (type(model),), {"forward": forward})
            return model

        CASES[name] = (build, kwargs or args or (rows(5, 8),))
        return forward

    return register


@case("autocast")
def _(self: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y = self.a(x)
        with torch.autocast("cpu", enabled=False):
            return self.b(y.float())


@case("autocast_that_is_off")
def _(self: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return self.b(self.a(x))


@case("checkpoint_reentrant")
def _(self: Any, x: Tensor) -> Tensor:
    return checkpoint(lambda t: self.b(self.a(t).relu()), x, use_reentrant=True) + 1


@case("checkpoint")
def _(self: Any, x: Tensor) -> Tensor:
    return checkpoint(lambda t: self.b(self.a(t).relu()), x, use_reentrant=False) + 1


@case("gradients_switched_on_and_off")
def _(self: Any, x: Tensor) -> Tensor:
    with torch.enable_grad():
        y = self.a(x)
        with torch.no_grad():
            y = y * 2
        y = y + 1
    return self.b(y)


@case("inference_mode")
@torch.inference_mode()
def _(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x))


def with_buffers() -> nn.Module:
    model = Two()
    model.register_buffer("mean", torch.zeros(8))
    model.register_buffer("steps", torch.zeros((), dtype=torch.long))
    return model


@case("buffers_updated_in_place", base=with_buffers)
def _(self: Any, x: Tensor) -> Tensor:
    self.mean.add_(1)
    self.steps += 1
    self.mean[2:5] = x.mean(0)[2:5]
    return self.a(x) + self.mean * self.steps


@case("buffer_assigned", base=with_buffers)
def _(self: Any, x: Tensor) -> Tensor:
    self.mean = self.mean * 0.9 + x.mean(0)
    return self.a(x) + self.mean


@case("input_written_to")
def _(self: Any, x: Tensor) -> Tensor:
    x.mul_(2)
    return self.a(x)


@case("writes")
def _(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    y += torch.arange(8)
    y.relu_()
    y[:, 0] = 1
    y[1:, 2:4] *= 3
    selected = y > 1
    selected |= y < 0.5
    y.masked_fill_(selected, -1.0)
    y[y > 4] = 7
    return self.b(y)


@case("write_through_a_reshape")
def _(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    y.view(-1).mul_(2)
    return self.b(y)


@case("writes_keep_the_dtype")
def _(self: Any, x: Tensor) -> Tensor:
    y = self.a(x).bfloat16()
    y.add_(x * 1.001)  # computed in float32, then rounded
    z = torch.zeros(x.shape, dtype=torch.bfloat16)
    z.copy_(y.float() * 3)
    z[0] = x[0]
    return self.b(z.float())


@case("a_part_written_after_it_was_read")
def _(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    before = y[:, :4].clone()
    y[:, :4] = 0
    return self.b(y + torch.cat([before, before], 1))


@case("write_seen_through_another_view")
def _(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    transposed = y.t()
    y.add_(1)
    return self.b(transposed.t() * 1)


@dataclasses.dataclass
class Out:
    value: Tensor
    more: Any = None


@case("output_is_an_unknown_dataclass")
def _(self: Any, x: Tensor) -> Out:
    return Out(self.a(x), {"b": [self.b(x)], "none": None})


@case("output_is_a_generator")
def _(self: Any, x: Tensor) -> Any:
    return (f(x) for f in (self.a, self.b))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(8, 8, 2, batch_first=True), nn.Linear(8, 8)


@case("lstm", rows(3, 4, 8), base=Recurrent)
def _(self: Any, x: Tensor) -> Tensor:
    return self.out(self.lstm(x)[0])


@case("keyword_only", x=rows(5, 8), scale=2.0, extra=rows(8))
def _(self: Any, *, x: Tensor, scale: float, **more: Tensor) -> Tensor:
    return self.a(x) * scale + more["extra"]


@case("nested_inputs", {"x": {"y": rows(5, 8)}}, [rows(5, 8), (rows(5, 8),)])
def _(self: Any, first: Any, second: Any) -> Tensor:
    return self.a(first["x"]["y"]) + self.b(second[0]) * second[1][0]


@case("inputs_that_are_no_tensors", rows(5, 8), 3, True, "relu", None)
def _(self: Any, x: Tensor, times: int, double: bool, kind: str, mask: Any) -> Tensor:
    for _ in range(times):
        x = self.a(x)
    x = x * 2 if double else x
    return x.relu() if kind == "relu" and mask is None else x


@case("einsum")
def _(self: Any, x: Tensor) -> Tensor:
    return torch.einsum("bd,od->bo", x, self.a.weight)


def normed() -> nn.Module:
    model = Two()
    nn.utils.parametrizations.weight_norm(model.a)
    nn.utils.parametrizations.spectral_norm(model.b)
    return model


@case("parametrizations", base=normed)
def _(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x))


def hooked() -> nn.Module:
    model = Two()
    model.a.register_forward_hook(lambda module, args, output: output * 2)
    model.offsets = torch.arange(8.0)  # neither parameter nor buffer
    return model


@case("hook_and_plain_tensor", base=hooked)
def _(self: Any, x: Tensor) -> Tensor:
    return self.a(x) + self.offsets


@case("branch_by_torch_cond")
def _(self: Any, x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda t: t * 2, lambda t: t - 1, (self.a(x),))


CASES["data_parallel"] = (lambda: nn.DataParallel(CASES["writes"][0]()), (rows(5, 8),))
CASES["transformer_encoder"] = (
    lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2),
    (rows(3, 4, 8),),
)


def run(program: Program, model: nn.Module, batch: Batch) -> list[Any]:
    """Node by node, with the model's own weights."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    names = {**program.parameters, **program.buffers}
    values = {**program.bind(batch, "the batch"), **program.constants, **{p: state[n] for p, n in names.items()}}
    with torch.no_grad():
        return list(fx.Interpreter(program.module).run(*(values[n] for n in program.placeholders)))


def plain(value: Any) -> list[Any]:
    if isinstance(value, Out):
        value = [value.value, value.more]
    return pytree.tree_leaves(list(value) if not isinstance(value, Tensor | list | dict) else value)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")  # of checkpoint_reentrant
@pytest.mark.parametrize("name", CASES)
def test_the_graph_computes_what_the_module_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, inputs = CASES[name]
    model, batch = seeded(build()), as_batch(copy.deepcopy(inputs))
    again: list[str] = []
    decompose = torch.export.ExportedProgram.run_decompositions

    def counted(exported: torch.export.ExportedProgram, table: Any) -> torch.export.ExportedProgram:
        again.append(name)
        return decompose(exported, table)

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", counted)
    program = canonicalize(capture(model, batch))
    assert bool(again) == (name in TRACED_TWICE)
    got = run(program, model, batch)

    with calibration_mode(model):
        want = plain(model(*copy.deepcopy(batch.args), **copy.deepcopy(batch.kwargs)))
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w) if isinstance(w, Tensor) else g == w
    assert not [n for n in program.graph.nodes if getattr(getattr(n.target, "_schema", None), "is_mutable", False)]


def test_einsum_stays() -> None:
    program = canonicalize(capture(CASES["einsum"][0](), as_batch(rows(5, 8))))
    assert [n.target for n in program.graph.nodes if n.op == "call_function"] == [aten.einsum.default]


def test_updates_of_buffers_are_no_outputs() -> None:
    model = CASES["buffers_updated_in_place"][0]()
    program = capture(model, as_batch(rows(5, 8)))
    (output,) = program.graph.find_nodes(op="output")
    assert len(output.args[0]) == 1
    assert model.steps == 0
