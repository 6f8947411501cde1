"""Into how many portions a stage is divided: what is predicted of them, and what is refused."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from gptq_ao import gptq_config, plan
from gptq_ao.errors import ConfigError
from gptq_ao.model.weights import ModelWeights
from gptq_ao.passes.records import Part, Plan, Portion, Segment, Selection, SharedInput, Stage
from gptq_ao.planning import memory
from gptq_ao.planning import plan as plan_module
from gptq_ao.planning.footprint import Footprint
from gptq_ao.planning.job import Job
from gptq_ao.planning.portions import Need, Room, choose_portions, note_of, whole
from gptq_ao.planning.prepare import prepare
from gptq_ao.planning.simulate import simulate

from ..distributed.test_quantize import Mixture
from ..models import seeded, tiny_llama, token_batches
from .test_plan import measured

EXPERTS = 8


def stage(*experts: int, entangled: bool = False) -> Stage:
    inputs = (SharedInput(f"h{i}", (), (Part(f"w{i}", 0, n),), 4, n) for i, n in enumerate(experts))
    return Stage(tuple(inputs), entangled)


def chosen(of: Stage, sizes: list[int], room: Room, besides: int = 0, waiting: int = 0) -> list[list[list[int]]]:
    """As lists of experts; and checks what is needed."""
    everything = sum(size * s.experts for size, s in zip(sizes, of.inputs, strict=True))
    once, again = [Need(100 + everything, waiting)], [Need(100 + besides + everything, waiting)]
    portions, needs = choose_portions(of, sizes, once, again, room)
    held = [sum(size * len(r) for size, r in zip(sizes, portion, strict=True)) for portion in portions]
    assert needs == (once if len(portions) == 1 else [Need(100 + besides + max(held), waiting)])
    # Every expert once, in order.
    for i, shared in enumerate(of.inputs):
        assert [e for portion in portions for e in portion[i]] == list(range(shared.experts))
    return [[list(r) for r in portion] for portion in portions]


@pytest.mark.parametrize(
    ("experts", "sizes", "room", "expected"),
    [
        ((6,), [10], Room(None), [[[0, 1, 2, 3, 4, 5]]]),
        ((6,), [10], Room(160), [[[0, 1, 2, 3, 4, 5]]]),
        ((6,), [10], Room(159), [[[0, 1, 2]], [[3, 4, 5]]]),  # of equal size, though five would fit
        ((5,), [10], Room(120), [[[0, 1]], [[2, 3]], [[4]]]),
        ((3,), [10], Room(110), [[[0]], [[1]], [[2]]]),
        ((3,), [10], Room(5), [[[0]], [[1]], [[2]]]),  # does not fit, and takes the least
        ((1,), [10], Room(5), [[[0]]]),
        ((1, 4), [20, 10], Room(130), [[[0], [0]], [[], [1, 2, 3]]]),
        ((1, 1, 1), [10, 30, 10], Room(140), [[[0], [0], []], [[], [], [0]]]),
        ((2, 2), [10, 10], Room(120), [[[0, 1], []], [[], [0, 1]]]),
    ],
)
def test_the_fewest_that_fit(experts: tuple[int, ...], sizes: list[int], room: Room, expected: Any) -> None:
    assert chosen(stage(*experts), sizes, room) == expected


def test_what_else_decides() -> None:
    # What is solved already is held beside the next portion.
    assert len(chosen(stage(6), [10], Room(159), besides=30)) == 3
    # More is held than is saved: then the layers run once.
    assert len(chosen(stage(2), [10], Room(110), besides=10)) == 1
    assert len(chosen(stage(6, entangled=True), [10], Room(0))) == 1
    # What waits counts where it does not give way, up to its limit.
    assert len(chosen(stage(6), [10], Room(160), waiting=1000)) == 1
    assert len(chosen(stage(6), [10], Room(160, waiting=30), waiting=1000)) == 2
    assert len(chosen(stage(6), [10], Room(160, waiting=2**63), waiting=50)) == 6


def test_the_note_names_the_weights() -> None:
    stages = (stage(4), stage(1, 1), stage(4), stage(1))
    empty: Any = None
    segment = Segment(empty, (), (), (), ())
    of = Plan(stages, (segment,) * 4, segment, Selection((), {}, ()))
    assert note_of(of, [whole(s) for s in stages]) is None
    halves: tuple[Portion, ...] = ((range(2),), (range(2, 4),))
    ones: tuple[Portion, ...] = ((range(1), range(0)), (range(0), range(1)))
    assert note_of(of, [halves, ones, halves, whole(stages[3])]) == (
        "the Hessians do not fit in memory together. experts in 2 portions of 2: what leads to them runs 2 times "
        "(w0, w0); weights in 2 portions of 1: what leads to them runs 2 times (w0)"
    )


def experts() -> nn.Module:
    """The Hessians of its wider stage outweigh all else."""
    return seeded(Mixture(EXPERTS, 64))


def config(**settings: Any) -> Any:
    return gptq_config(**{"bits": 4, "group_size": 32, "effort": "fast", "calibration": token_batches(2), **settings})


def footprints(device: str = "cpu") -> Callable[[Room], Footprint]:
    weights = ModelWeights(experts())
    prepared = prepare(Job.of(weights, config(), device="cpu"))
    return lambda room: simulate(weights, prepared, torch.device(device), room=room)


@pytest.mark.parametrize(("portions", "each"), [(1, 8), (2, 4), (3, 3), (4, 2), (8, 1)])
def test_the_prediction_is_what_happens(portions: int, each: int, monkeypatch: pytest.MonkeyPatch) -> None:
    footprint = footprints()
    size = footprint(Room()).peak
    while len(footprint(Room(size, 2**63)).portions[1]) < portions:
        size -= 2 * 128**2  # half a Hessian
    for place in (memory, plan_module):
        monkeypatch.setattr(place, "room_of", lambda job: Room(size, 2**63))
    monkeypatch.setattr(memory, "SMALL", 0)
    model = experts()
    planned = plan(model, config())
    how = f"experts in {portions} portions of {each}: what leads to them runs {portions} times"
    assert [how in note for note in planned.notes] == [True] * (portions > 1)
    assert planned.to_dict()["notes"] == list(planned.notes)
    assert all(f"note: {note}" in str(planned).splitlines() for note in planned.notes)
    report, peak = measured(model, config(), monkeypatch)
    assert [n for n in report.notes if "portions" in n] == list(planned.notes)
    assert portions == 8 or planned.peak_bytes["device"] <= size
    assert planned.peak_bytes["device"] == pytest.approx(peak, rel=0.05)


@pytest.mark.parametrize("processes", [1, 2])
def test_what_is_free_decides_without_a_limit(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU as on a device; a model that is not there yet takes of what is free, too."""
    model = experts()
    whole = plan(model, config(), processes=processes).peak_bytes["device"]
    taken = sum(p.nbytes for p in model.parameters())
    share = memory.HOST_SHARE / processes

    def notes(free: float, of: nn.Module = model, **options: Any) -> tuple[str, ...]:
        monkeypatch.setattr(memory, "free_bytes", lambda device: int(free))
        return plan(of, config(), processes=processes, **options).notes

    assert notes((whole - taken) / share + 2) == ()
    (note,) = notes((whole - taken) / share - 2)
    assert "experts in 2 portions of 4" in note
    assert notes((whole - taken) / share + 2, experts().to("meta")) != ()
    assert notes(whole / share + 2, experts().to("meta")) == ()


def test_time_and_memory_of_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers run again; the sums are summed once."""
    found: list[Footprint] = []

    def seconds(footprint: Footprint, device: torch.device) -> dict[str, float]:
        found.append(footprint)
        return {}

    monkeypatch.setattr(plan_module, "_seconds", seconds)
    for size in (None, 0):
        monkeypatch.setattr(plan_module, "room_of", lambda job, size=size: Room(size))
        plan(experts(), config())
    once, again = found
    assert [len(of_stage) for of_stage in once.portions] == [1, 1, 1]
    assert [len(of_stage) for of_stage in again.portions] == [8, 8, 1]
    assert (again.working, again.activations, again.rows) < (once.working, once.activations, once.rows)
    assert again.activations == once.activations
    assert again.rows == once.rows
    assert again.solve == once.solve
    # 2 batches of 2 x 40 tokens, all of which run through all experts: 8 x 80 rows.
    sums = 2 * (2 * 8 * 80) * (64**2 + 128**2) + 2 * (2 * 80) * 64**2
    layers = sum(once.calibrate.flops.values()) - sums
    # Eight times: what the second stage's segment computes, the first product.
    up = 2 * (2 * 8 * 80) * 64 * 128
    assert sum(again.calibrate.flops.values()) - sums == layers + 7 * up
    assert again.calibrate.moved > once.calibrate.moved


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for what is free there")
def test_a_limit_of_a_device() -> None:
    model, made, working = experts(), config(), footprints("cuda")(Room()).working

    def limited(size: int, of: nn.Module = model) -> Any:
        return plan(of, made, device="cuda", max_memory={"cuda": size})

    # Activations go elsewhere before anything runs twice.
    assert limited(working).notes == ()
    assert limited(working).peak_bytes["host"] > limited(2 * working).peak_bytes["host"]
    divided = limited(working - 1)
    assert re.search(r"experts in \d portions of \d: .* \(down\)", divided.notes[0])
    assert divided.peak_bytes["device"] < working
    message = (
        r"max_memory allows 1.00 KiB on cuda, but the weights and temporaries of one segment and a portion of its "
        r"Hessians, for down, take .*: allow more, or use"
    )
    with pytest.raises(ConfigError, match=message):
        limited(1024)
    with pytest.raises(ConfigError, match=r"of one segment and its Hessians, for model\.layers\.\d\..*, take .*"):
        limited(1024, tiny_llama())
