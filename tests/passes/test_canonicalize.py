import torch
from torch import Tensor, nn

from gptq_ao.calibration.batches import as_batch
from gptq_ao.passes.canonicalize import canonicalize
from gptq_ao.passes.capture import capture
from gptq_ao.passes.records import Program

from ..models import seeded, tiny_llama, token_batches

aten = torch.ops.aten


def captured(model: nn.Module, *args: Tensor) -> Program:
    return capture(model, as_batch(args))


def evaluate(program: Program, model: nn.Module, *inputs: Tensor) -> Tensor:
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    values = iter(inputs)
    names = {**program.parameters, **program.buffers}
    arguments = [
        next(values) if n in program.inputs else program.constants[n] if n in program.constants else state[names[n]]
        for n in program.placeholders
    ]
    with torch.no_grad():
        return program.module(*arguments)[0]


class Noise(nn.Module):
    """Two linears read one value through operations that do nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.drop = nn.Linear(8, 4), nn.Linear(8, 4), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        left = self.a(self.drop(x.to(torch.float32)).view(x.shape))
        return left + self.b(x.detach()[:, :].expand(x.shape))


def test_equal_activations_become_one_node_and_no_number_changes() -> None:
    model = seeded(Noise())
    before = captured(model, torch.ones(2, 8))
    after = canonicalize(before)
    reads = {n.args[0] for n in after.graph.nodes if n.target is aten.linear.default}
    assert len({n.args[0] for n in before.graph.nodes if n.target is aten.linear.default}) == 2
    assert len(reads) == 1
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(evaluate(before, model, x), evaluate(after, model, x))
    assert torch.equal(evaluate(after, model, x), model(x).detach())


class Works(nn.Module):
    """Operations of the same kinds that do something: they must stay."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x.view(-1, 4)[1:])
        return y.to(torch.float64).to(torch.float32).T.contiguous()


def test_operations_that_change_something_stay() -> None:
    model = seeded(Works())
    program = canonicalize(captured(model, torch.ones(2, 8)))
    kinds = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert aten.view.default in kinds
    assert aten.slice.Tensor in kinds
    assert sum(k in (aten.to.dtype, aten._to_copy.default) for k in kinds) == 2
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(evaluate(program, model, x), model(x).detach())


def test_the_given_program_is_unchanged() -> None:
    before = captured(Noise().eval(), torch.ones(2, 8))
    text = str(before.graph)
    canonicalize(before)
    assert str(before.graph) == text


def test_assertions_go() -> None:
    program = canonicalize(capture(tiny_llama(), as_batch(token_batches()[0])))
    names = [str(n.target) for n in program.graph.nodes]
    assert not any("assert" in name for name in names)


def test_devices_in_the_graph_follow_the_one_that_runs_it() -> None:
    model = tiny_llama(layers=1)
    before = capture(model, as_batch(token_batches()[0]))
    moved = canonicalize(before, torch.device("meta"))
    devices = {n.kwargs["device"] for n in moved.graph.nodes if n.kwargs.get("device") is not None}
    assert devices == {torch.device("meta")}
