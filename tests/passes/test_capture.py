import dataclasses

import pytest
import torch
from torch import Tensor, nn

from gptq_ao.batches import as_batch
from gptq_ao.errors import CalibrationError, CaptureError
from gptq_ao.passes.capture import calibration_mode, capture

from ..models import seeded, tiny_llama, token_batches


def snapshot(model: nn.Module) -> list[tuple[object, ...]]:
    """Everything of the modules that a capture could leave changed, by identity."""
    rows: list[tuple[object, ...]] = []
    for name, m in model.named_modules():
        own = {k: id(v) for k, v in m.__dict__.items() if not k.startswith("_") and k != "training"}
        tensors = {k: id(v) for table in (m._parameters, m._buffers) for k, v in table.items()}
        rows.append((name, m.training, own, tensors))
    return rows


def test_every_tensor_is_a_placeholder_with_its_name_in_the_model() -> None:
    model = tiny_llama()
    program = capture(model, as_batch(token_batches()[0]))
    named = dict(model.named_parameters())
    assert set(program.parameters.values()) == set(named)
    for placeholder, name in program.parameters.items():
        assert program.placeholders[placeholder].meta["val"].shape == named[name].shape
    assert set(program.buffers.values()) <= {n for n, _ in model.named_buffers()}
    assert program.inputs == ("input_ids",)
    assert not any(n.op == "get_attr" for n in program.graph.nodes)


def test_batch_and_length_stay_free() -> None:
    program = capture(tiny_llama(), as_batch({"input_ids": torch.zeros(1, 9, dtype=torch.long)}))
    for shape in ((1, 9), (3, 9), (2, 31)):
        bound = program.bind(as_batch({"input_ids": torch.zeros(*shape, dtype=torch.long)}), "batch")
        assert bound["input_ids"].shape == shape


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_llama().train()
    model.model.layers[0].eval()
    before, cache = snapshot(model), model.config.use_cache
    fast_path, rng = torch.backends.mha.get_fastpath_enabled(), torch.get_rng_state()
    capture(model, as_batch(token_batches()[0]))
    assert snapshot(model) == before
    assert model.config.use_cache is cache
    assert torch.backends.mha.get_fastpath_enabled() == fast_path
    assert torch.equal(torch.get_rng_state(), rng)
    assert "forward" not in vars(model)
    assert torch.is_grad_enabled()


class Remembers(nn.Module):
    """Stores a tensor on itself in its forward, as rotary embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.linear(x)
        return self.last


def test_tensors_that_a_forward_stores_are_taken_back() -> None:
    model = Remembers()
    capture(model, as_batch(torch.ones(2, 8)))
    assert model.last is None


def test_state_is_restored_when_the_capture_fails() -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("no such branch")

    model = Fails()
    before = snapshot(model)
    message = r"(?s)could not capture the model.*test_capture.py:\d+, in forward\n +raise KeyError.*first check.*no"
    with pytest.raises(CaptureError, match=message):
        capture(model, as_batch(torch.ones(2, 4)))
    assert snapshot(model) == before
    assert model.training


def test_branching_on_values_is_named() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) if x.sum() > 0 else x

    with pytest.raises(CaptureError, match="branches on, or sizes a tensor by, the values of a tensor"):
        capture(Branches(), as_batch(torch.ones(2, 4)))


def test_in_place_operations_become_functional() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            y += 1
            return y.relu_()

    program = capture(InPlace(), as_batch(torch.ones(2, 4)))
    assert not any(getattr(n.target, "_schema", None) and n.target._schema.is_mutable for n in program.graph.nodes)


def test_outputs_of_an_unknown_dataclass() -> None:
    @dataclasses.dataclass
    class Out:
        value: Tensor

    class Wraps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Out:
            return Out(self.linear(x))

    program = capture(Wraps(), as_batch(torch.ones(2, 4)))
    assert len(program.inputs) == 1


def test_calibration_mode_restores_when_the_body_raises() -> None:
    model = seeded(nn.Sequential(nn.Linear(4, 4), nn.Dropout())).train()

    def body() -> None:
        with calibration_mode(model):
            assert not any(m.training for m in model.modules())
            assert not torch.is_grad_enabled()
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        body()
    assert all(m.training for m in model.modules())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"ids": torch.zeros(2, 9, dtype=torch.long)}, r"batch 3 has the inputs \['ids'\], .* with \['input_ids'\]"),
        ({"input_ids": [torch.zeros(2, 9)]}, r"batch 3 has the structure"),
        ({"input_ids": torch.zeros(2, 9, 1, dtype=torch.long)}, r"'input_ids' is torch.int64 \(2, 9, 1\)"),
        ({"input_ids": torch.zeros(2, 9)}, r"'input_ids' is torch.float32 \(2, 9\).*captured with torch.int64"),
    ],
)
def test_a_batch_of_another_structure(batch: dict[str, object], message: str) -> None:
    program = capture(tiny_llama(layers=1), as_batch(token_batches()[0]))
    with pytest.raises(CalibrationError, match=message):
        program.bind(as_batch(batch), "batch 3")


class FixedLength(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.linear(x) * scale


def test_a_size_that_the_model_fixes() -> None:
    program = capture(FixedLength(), as_batch((torch.ones(2, 6), 2.0)))
    program.bind(as_batch((torch.ones(5, 6), 2.0)), "batch 1")
    with pytest.raises(CalibrationError, match=r"batch 1: input .* has 12 elements along axis 1; .* at capture, to 6"):
        program.bind(as_batch((torch.ones(5, 12), 2.0)), "batch 1")


def test_a_literal_that_differs() -> None:
    program = capture(FixedLength(), as_batch((torch.ones(2, 6), 2.0)))
    with pytest.raises(CalibrationError, match=r"input 1 is 3.0, the model was captured with 2.0"):
        program.bind(as_batch((torch.ones(2, 6), 3.0)), "batch 1")
