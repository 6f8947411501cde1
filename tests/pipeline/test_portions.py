"""Stages whose Hessians do not fit together: however many are observed at a time, the result is the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gptq_ao import gptq_config, quantize_, quantize_checkpoint
from gptq_ao.errors import NonFiniteError, StrictError
from gptq_ao.passes import calibrate
from gptq_ao.planning import memory
from gptq_ao.planning.fake_observers import FakeObserver
from gptq_ao.report import Report
from gptq_ao.solver.hessian import HessianObserver

from ..checkpoint.test_source import saved
from ..distributed.test_quantize import Mixture
from ..models import seeded, token_batches
from .test_experts import mixture, padded_batches
from .test_quantize_checkpoint import assert_same_checkpoint
from .test_resume import StoppedError, assert_equal, parts, stop_after


def scarce(monkeypatch: pytest.MonkeyPatch) -> list[HessianObserver]:
    """Nothing is free, so there is one Hessian at a time. Returns the observers that held more."""
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0)
    held: list[HessianObserver] = []
    forward = HessianObserver.forward

    def watched(self: HessianObserver, *args: Any) -> None:
        forward(self, *args)
        if len(self.portion) > 1 and not isinstance(self, FakeObserver):
            held.append(self)

    monkeypatch.setattr(HessianObserver, "forward", watched)
    return held


class Loop(nn.Module):
    """Experts that are modules of their own, each with rows of its own, beside one that all tokens take."""

    def __init__(self, experts: int = 3, width: int = 32) -> None:
        super().__init__()
        self.embed, self.everyone = nn.Embedding(96, width), nn.Linear(width, width)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(experts))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        y = self.everyone(x)
        for number, expert in enumerate(self.experts):
            y = y + expert(torch.where((input_ids % 3 == number).unsqueeze(-1), x, 0.0))
        return y


class NoisyExperts(nn.Module):
    """Draws random numbers on the way to its experts, and behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.empty(3, 32, 32))
        self.first, self.last = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = torch.bmm((x + torch.rand_like(x)).unflatten(0, (3, -1)), self.experts.mT).flatten(0, 1)
        return self.last(x + torch.rand_like(x))


class Shared(nn.Module):
    """Weights of two shapes and bits over the same rows of experts, and another that reads the stream beside them."""

    def __init__(self, experts: int = 3, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, width)
        self.gate, self.up = (nn.Parameter(torch.empty(experts, n * width, width)) for n in (1, 2))
        self.down, self.beside = nn.Parameter(torch.empty(experts, width, 2 * width)), nn.Linear(width, width)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        rows = torch.stack([torch.where((input_ids % 3 == e).unsqueeze(-1), x, 0.0).flatten(0, 1) for e in range(3)])
        gate, up = torch.bmm(rows, self.gate.mT).sigmoid(), torch.bmm(rows, self.up.mT).relu()
        y = torch.bmm(up * torch.cat([gate, gate], -1), self.down.mT).sum(0).view(x.shape)
        return x + y + self.beside(x)


def noise() -> list[Tensor]:
    return [torch.randn(24, 32, generator=torch.Generator().manual_seed(i)) for i in range(3)]


TOKENS, EVEN = token_batches(), [{"input_ids": torch.arange(0, 96, 2).view(2, 24)}]
# Name → model, data, settings, portions that the note tells of.
CASES: dict[str, tuple[Callable[[], nn.Module], list[Any], dict[str, Any], str]] = {
    "grouped_mm with padding": (mixture, padded_batches(), {"expert_min_rows": 4}, "5 portions of 1"),
    "two layers, the second behind quantized experts": (lambda: mixture(2), padded_batches(), {}, "5 portions of 1"),
    "hardly any rows": (mixture, padded_batches(), {"expert_min_rows": 10}, "5 portions of 1"),
    "all with too few rows": (mixture, TOKENS[:1], {"expert_min_rows": 10**6}, "5 portions of 1"),
    "calibrate_all_experts": (mixture, padded_batches(), {"calibrate_all_experts": True}, "portions of 1"),
    "bmm, one without rows": (lambda: seeded(Mixture()), TOKENS, {"expert_min_rows": 100}, "4 portions of 1"),
    "no expert is chosen twice": (lambda: seeded(Mixture()), EVEN, {"expert_min_rows": 1}, "4 portions of 1"),
    "adapters": (lambda: seeded(Mixture()), TOKENS, {"adapter_rank": 2, "bits": 3}, "4 portions of 1"),
    "residual compensation": (
        lambda: seeded(Shared()),
        TOKENS,
        {"compensate": "residual", "rules": {"down": {"bits": 8}}, "expert_min_rows": 1},
        "4 portions of 1",
    ),
    "modules of their own": (lambda: seeded(Loop()), TOKENS, {}, "weights in 4 portions of 1"),
    "random numbers": (lambda: seeded(NoisyExperts()), noise(), {"expert_min_rows": 1}, "3 portions of 1"),
    "automatic precision": (
        lambda: seeded(Mixture()),
        TOKENS,
        {"target_bits": 8.0, "candidates": (3, 4, 8), "group_size": 32, "expert_min_rows": 100},
        "4 portions of 1",
    ),
}


def config(data: list[Any], settings: dict[str, Any]) -> Any:
    return gptq_config(**{"bits": 4, "group_size": 8, "effort": "fast", **settings}, calibration=data)


def assert_same_but_for_the_note(whole: Report, divided: Report, note: str) -> None:
    facts = [{k: v for k, v in r.to_dict().items() if k not in ("seconds", "peak_bytes")} for r in (whole, divided)]
    (found,) = [n for n in facts[1]["notes"] if n not in facts[0]["notes"]]
    assert found.startswith("the Hessians do not fit in memory together. ")
    assert f"{note}: what leads to them runs " in found
    facts[1]["notes"].remove(found)
    assert facts[0] == facts[1]
    assert_equal(*({n: a.A for n, a in r.adapter.items()} for r in (whole, divided)))


@pytest.mark.parametrize("name", CASES)
def test_portions_make_what_one_makes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, data, settings, note = CASES[name]
    whole, divided = make(), make()
    torch.manual_seed(5)
    expected: Any = quantize_(whole, config(data, settings))
    held = scarce(monkeypatch)
    torch.manual_seed(5)
    report: Any = quantize_(divided, config(data, settings))
    assert held == []
    assert_equal(parts(whole), parts(divided))
    assert_same_but_for_the_note(expected, report, note)


def test_a_run_ends_and_goes_on_with_other_portions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage is one entry of the journal, in however many portions it was solved."""
    made, whole = config(padded_batches(), {"expert_min_rows": 4}), mixture(2)
    expected: Any = quantize_(whole, made)
    behind_experts = next(w.stage for w in expected.weights if "experts.gate_up" in w.name)
    with pytest.MonkeyPatch.context() as patch:
        scarce(patch)
        with pytest.raises(StoppedError):
            quantize_(mixture(2), made, journal=tmp_path / "j", progress=stop_after(behind_experts))
    resumed = mixture(2)
    quantize_(resumed, made, journal=tmp_path / "j")
    assert_equal(parts(whole), parts(resumed))
    scarce(monkeypatch)
    again = mixture(2)
    quantize_(again, made, journal=tmp_path / "j")
    assert_equal(parts(whole), parts(again))


@pytest.mark.parametrize("snapshot_every", [0, 1])
def test_a_run_that_ends_within_a_stage_does_it_again(
    snapshot_every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, whole = config(noise(), {"expert_min_rows": 1}), seeded(NoisyExperts())
    torch.manual_seed(5)
    quantize_(whole, made)
    scarce(monkeypatch)
    observe, runs = calibrate.calibrate, iter(range(100))

    def stops(*args: Any, **kwargs: Any) -> Any:
        if next(runs) == 2:  # the second of three portions of the experts
            raise StoppedError
        return observe(*args, **kwargs)

    options: dict[str, Any] = {"journal": tmp_path / "j", "snapshot_every": snapshot_every}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gptq_ao.pipeline.run_plan.calibrate", stops)
        model = seeded(NoisyExperts())
        torch.manual_seed(5)
        with pytest.raises(StoppedError):
            quantize_(model, made, **options)
    resumed = seeded(NoisyExperts())
    torch.manual_seed(7)  # the journal has the state of random numbers
    quantize_(resumed, made, **options)
    assert_equal(parts(whole), parts(resumed))


def test_a_checkpoint_is_streamed_in_portions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = saved("qwen3_moe", tmp_path / "model")
    made = config(token_batches(vocabulary=64), {"expert_min_rows": 8})
    expected = quantize_checkpoint(directory, tmp_path / "whole", made)
    held = scarce(monkeypatch)
    report = quantize_checkpoint(directory, tmp_path / "divided", made)
    assert held == []
    assert any("portions of 1" in note for note in report.notes)
    assert not any("portions" in note for note in expected.notes)
    assert report.weights == expected.weights
    assert_same_checkpoint(tmp_path / "whole", tmp_path / "divided")


class Again(nn.Module):
    """Its experts are applied to what comes out of them: their stage reads their own weights."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.out = nn.Parameter(torch.empty(3, 32, 32)), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = torch.bmm(x.unflatten(0, (3, -1)), self.experts.mT).tanh().flatten(0, 1)
        return self.out(x)


def test_a_stage_that_reads_its_own_weights_is_not_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, scarcely = seeded(Again()), seeded(Again())
    expected: Any = quantize_(whole, config(noise(), {"expert_min_rows": 1}))
    scarce(monkeypatch)
    report: Any = quantize_(scarcely, config(noise(), {"expert_min_rows": 1}))
    assert_equal(parts(whole), parts(scarcely))
    assert report.notes == expected.notes


def test_errors_of_a_portion(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is as it was, whichever portion finds what is wrong."""
    scarce(monkeypatch)
    model = seeded(NoisyExperts())
    before = {n: p.clone() for n, p in model.named_parameters()}
    data = noise()
    data[1][-1] = torch.inf  # of the last expert
    with pytest.raises(NonFiniteError, match=r"NaN or infinite in calibration batch 1"):
        quantize_(model, config(data, {"compensate": "none"}))
    assert_equal(before, parts(model))
    other = seeded(Mixture())
    before = {n: p.clone() for n, p in other.named_parameters()}
    with pytest.raises(StrictError, match=r"up: the expert saw 0 rows, fewer than 1: .*strict=True"):
        quantize_(other, config(TOKENS, {"strict": True, "expert_min_rows": 1}))
    assert_equal(before, parts(other))
