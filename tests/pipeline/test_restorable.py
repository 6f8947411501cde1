"""A run that fails or is interrupted after weights were replaced leaves the model as it was."""

from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor, nn

from gptq_ao import gptq_config, quantize_
from gptq_ao.model.weights import ModelWeights
from gptq_ao.pipeline import restorable
from gptq_ao.pipeline.restorable import RestorableWeights
from gptq_ao.planning.job import Job
from gptq_ao.tensor import GroupTensor

from ..models import seeded, tiny_llama, token_batches


class Branching(nn.Module):
    """Cannot be captured, so that its forwards are replayed; draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.register_buffer("scale", torch.ones(64))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x + 0 * torch.rand_like(x))
        return self.second(y.relu() if y.mean().item() > 0 else y)


def rows() -> list[Tensor]:
    return [torch.randn(20, 64, generator=torch.Generator().manual_seed(i)) for i in range(2)]


def offloaded() -> nn.Module:
    model = tiny_llama(layers=1)
    accelerate.cpu_offload(model, "cpu", offload_buffers=True)
    return model


Make = Callable[[], nn.Module]
# Name → the model, its settings, how many steps it takes. (Automatic precision changes nothing in the first half.)
RUNS: dict[str, tuple[Make, dict[str, Any], int]] = {
    "graph": (lambda: tiny_llama(layers=1), {"calibration": token_batches(2)}, 4),
    "tied": (lambda: tiny_llama(layers=1, tied=True), {"calibration": token_batches(2), "compensate": "none"}, 4),
    "offloaded": (offloaded, {"calibration": token_batches(2)}, 4),
    "replay": (lambda: seeded(Branching()), {"calibration": rows()}, 2),
    "rtn": (lambda: tiny_llama(layers=1), {"method": "rtn"}, 7),
    "precision": (
        lambda: tiny_llama(layers=1),
        {"calibration": token_batches(2), "target_bits": 6.0, "candidates": (4, 8)},
        8,
    ),
}


def interrupted(model: nn.Module, settings: dict[str, Any], error: type[BaseException], at: int) -> BaseException:
    calls = 0

    def progress(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise error("stop")

    with pytest.raises(error, match="stop") as e:
        quantize_(model, gptq_config(group_size=32, effort="fast", **settings), progress=progress)
    return e.value


def state(model: nn.Module) -> list[Any]:
    """What a user could notice: which object stands under which name, in which order, and the flags."""
    return [
        (
            prefix,
            module.training,
            [(n, id(t)) for table in (module._parameters, module._buffers) for n, t in table.items()],
            getattr(getattr(module, "_hf_hook", None), "offload", None),
        )
        for prefix, module in model.named_modules(remove_duplicate=False)
    ]


@pytest.mark.parametrize(("name", "error"), [*((name, RuntimeError) for name in RUNS), ("graph", KeyboardInterrupt)])
def test_everything_is_put_back(name: str, error: type[BaseException]) -> None:
    make, settings, steps = RUNS[name]
    model = make().train()
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    linear = next(m for m in model.modules() if isinstance(m, nn.Linear))
    linear.register_forward_hook(lambda *_: None)
    before, values = state(model), {n: p.detach().clone() for n, p in model.named_parameters() if not p.is_meta}
    random = torch.get_rng_state()
    assert not hasattr(interrupted(model, settings, error, at=steps), "__notes__")
    assert state(model) == before
    assert all(torch.equal(p, values[n]) for n, p in model.named_parameters() if n in values)
    assert [p.requires_grad for p in model.parameters()] == [p is not frozen for p in model.parameters()]
    assert len(linear._forward_hooks) == 1
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()


def test_random_numbers_of_the_model_are_taken_back() -> None:
    model, random = seeded(Branching()), torch.get_rng_state()
    quantize_(model, gptq_config(4, 32, calibration=rows()))
    assert torch.equal(torch.get_rng_state(), random)
    assert isinstance(model.first.weight, GroupTensor)


@pytest.mark.parametrize("name", ["graph", "replay", "rtn"])
@pytest.mark.parametrize("free", [0, None])
def test_without_room_a_note_says_so(name: str, free: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """`None`: a device of which nothing is known."""
    monkeypatch.setattr(restorable, "free_bytes", lambda device: free)
    make, settings, _ = RUNS[name]
    model = make()
    e = interrupted(model, settings, KeyboardInterrupt, 2)
    (note,) = e.__notes__
    assert note.endswith(
        "weights are quantized already, and there was no room to keep the original ones: reload the model"
    )
    if name != "replay":  # which puts tensors in place at the end; until then, their parameters have other values
        assert sum(isinstance(p, GroupTensor) for p in model.parameters()) == int(note.split()[0])


def test_originals_are_let_go_when_room_gets_scarce(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are kept while they take less than half of what is free: here for about three weights."""
    model = tiny_llama(layers=1)
    bytes_of_six = 6 * model.get_parameter("model.layers.0.mlp.up_proj.weight").nbytes
    monkeypatch.setattr(restorable, "free_bytes", lambda device: bytes_of_six)
    settings = {"method": "rtn"}
    assert not hasattr(interrupted(model, settings, RuntimeError, 2), "__notes__")
    assert not any(isinstance(p, GroupTensor) for p in model.parameters())
    assert interrupted(model, settings, RuntimeError, 7).__notes__[0].startswith("7 weights are quantized")


def test_what_fails_before_anything_is_replaced_has_no_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restorable, "free_bytes", lambda device: 0)
    batches = [*token_batches(1), {"input_ids": torch.zeros(2, 2, 2, dtype=torch.long)}]
    with pytest.raises(ValueError, match="calibration batch 1") as e:
        quantize_(tiny_llama(layers=1), gptq_config(4, 32, calibration=batches))
    assert not hasattr(e.value, "__notes__")


def test_where_the_need_is_known_only_what_it_leaves_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def free_bytes(device: torch.device) -> int:
        raise AssertionError("not asked")

    monkeypatch.setattr(restorable, "free_bytes", free_bytes)
    for room, kept in ((64 * 64 * 4, True), (64 * 64 * 4 - 1, False)):
        model = seeded(nn.Sequential(nn.Linear(64, 64)))
        weight = model[0].weight
        weights = RestorableWeights(Job.of(ModelWeights(model), gptq_config(4, 32, method="rtn")))
        weights.keep_at_most(room, torch.device("cpu"))

        @weights.restored_on_error()
        def fails(weights: RestorableWeights = weights) -> None:
            weights.replace("0.weight", torch.zeros(64, 64))
            raise RuntimeError("stop")

        with pytest.raises(RuntimeError, match="stop") as e:
            fails()
        assert (model[0].weight is weight) == kept
        assert hasattr(e.value, "__notes__") != kept
