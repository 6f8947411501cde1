"""A plan carried out on fake tensors: what will be in memory at most, and how much work it is.

Every segment runs once for each distinct shape of batch, with its observers, as in `passes/calibrate.py` and
`pipeline/run_plan.py`; nothing is computed or allocated. What solving takes comes from `solve_cost.py`, and into how
many portions a stage is divided, from `portions.py`.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from gptq_ao.calibration.activation_store import compact
from gptq_ao.codes.packed_spec import PackedSpec
from gptq_ao.codes.tiles import pack_codes, pack_scale_zero
from gptq_ao.distributed.ranks import ALONE, Ranks
from gptq_ao.kernels import cuda, reference
from gptq_ao.kernels.packed import Packed
from gptq_ao.model.weights import Weights
from gptq_ao.passes.calibrate import run_segment
from gptq_ao.passes.follow_original import last_reads
from gptq_ao.passes.records import Part, Portion, Program, Segment, SharedInput, Stage, twin_of
from gptq_ao.planning.fake_observers import FakeObserver, fake_observers
from gptq_ao.planning.footprint import Footprint, Work
from gptq_ao.planning.live_bytes import LiveBytes, storages
from gptq_ao.planning.portions import Need, Room, choose_portions
from gptq_ao.planning.prepare import Calibrated, Prepared
from gptq_ao.planning.segment_forms import Run, SegmentRuns, graph_form, kept, made, value_forms
from gptq_ao.planning.solve_cost import SolveCost, result_bytes, solve_cost
from gptq_ao.recipe import Recipe

__all__ = ["Footprint", "Work", "fakes_on", "simulate"]

Values = dict[str, Any]
PackedTensors = tuple[Tensor | None, ...]  # qdata, scale_zero, high_plane, perm


def simulate(
    weights: Weights, prepared: Prepared, device: torch.device, ranks: Ranks = ALONE, room: Room | None = None
) -> Footprint:
    """Neither weights nor the values of batches are read; shapes and dtypes say all.

    Args:
        device: where it will compute: `prepared.device`, or what that stands in for.
        ranks: that share batches and weights; the footprint is that of this one.
        room: for which stages are divided into portions; None: as much as they need.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as tracker, torch.no_grad():
        run = _Simulation(weights, prepared, device, tracker, ranks, room or Room())
        if prepared.calibrated is None:
            run.round_all()
        else:
            run.run(prepared.calibrated)
        return Footprint(
            run.resident,
            run.working,
            run.peak,
            run.waiting,
            run.from_files,
            run.rows,
            run.packed_bytes,
            run.calibration,
            run.solving,
            tuple(run.portions),
            run.largest,
        )


def fakes_on(device: torch.device) -> torch.device:
    """`device`, or the CPU if torch was built without support for it and makes no fake tensors there. The CPU's
    operators then say nearly the same."""
    try:
        with FakeTensorMode():
            torch.empty(2, device=device)[:1]
    except RuntimeError:
        return torch.device("cpu")
    return device


class _Simulation:
    """What a `Footprint` says, and the fakes that are alive: the model where it is on the device, one batch of each
    shape. Other batches of the shape are only counted."""

    def __init__(
        self, weights: Weights, prepared: Prepared, device: torch.device, tracker: LiveBytes, ranks: Ranks, room: Room
    ) -> None:
        self.weights, self.tracker, self.ranks, self.room = weights, tracker, ranks, room
        self.device, self.real_device = prepared.device, device
        self.layouts, self.settings = prepared.selection.layouts, prepared.selection.settings
        model = weights.model
        self.state = {**dict(model.named_buffers(remove_duplicate=False)), **dict(model.named_parameters())}
        self.here = {n: self.fake(t) for n, t in self.state.items() if self.is_here(n, quantized=False)}
        self.resident = self.working = self.peak = self.live
        self.waiting = 0
        self.portions: list[tuple[Portion, ...]] = []  # of each stage
        self.needs: list[Need] = []  # of a phase of a stage
        self.largest = ("", 1)
        self.originals: dict[str, Tensor] = {}  # still to be read; on meta, if they are not on the device
        self.from_files = 0  # bytes of those, at most
        self.packed: dict[str, PackedTensors] = {}  # on meta, if they are not on the device
        self.packed_bytes: dict[str, int] = {}
        self.observed: list[Tensor] = []  # what observers hold besides their sums
        self.ran: dict[Any, SegmentRuns] = {}  # form of a segment and all that it reads → what it took
        self.packings: dict[PackedSpec, tuple[PackedTensors, int]] = {}  # see `pack`
        self.rows: dict[str, int] = {}
        self.calibration, self.solving = Work(), Work()
        self.again = Work()  # of a segment, if it runs without observers
        self.values: dict[Any, Values] = {}  # shape → what waits of a batch
        self.all: list[Any] = []  # the shapes of all batches, in order
        self.turns: list[Any] = []  # and of this rank's

    @property
    def live(self) -> int:
        return self.tracker.live[self.device.type]

    @property
    def samples(self) -> int:
        """Bytes of the batches that are alive as fakes."""
        return sum(_bytes(v) for v in self.values.values())

    def fake(self, t: Tensor) -> Tensor:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=self.device)

    def is_here(self, name: str, *, quantized: bool) -> bool:
        home = self.weights.home(name, quantized=quantized)
        return home is not None and home.type == self.real_device.type

    def need(self, working: int, waiting: int) -> None:
        self.needs.append(Need(working, waiting))

    def settle(self, needs: Sequence[Need], weight: str = "", portions: int = 1) -> None:
        working = max(n.working for n in needs)
        if working > self.working:
            self.working, self.largest = working, (weight, portions)
        self.peak = max(self.peak, *(n.working + n.waiting for n in needs))

    def phase(self) -> list[Need]:
        """What was needed since the last call."""
        needs, self.needs = self.needs, []
        return needs

    def run(self, calibrated: Calibrated) -> None:
        self.all = [tuple((n, t.shape, t.dtype) for n, t in batch.items()) for batch in calibrated.batches]
        self.turns = list(self.ranks.share(self.all))
        for shape, batch in zip(self.all, calibrated.batches, strict=True):
            if shape not in self.values:
                self.values[shape] = {n: self.fake(t) for n, t in batch.items()}
        last = last_reads(calibrated.program, calibrated.plan)  # weight → the last segment that reads its original
        stages = zip(calibrated.plan.stages, calibrated.plan.segments, strict=True)
        for number, (stage, segment) in enumerate(stages, 1):
            with fake_observers(stage, segment, self.device) as observers:
                self.calibrate(calibrated.program, stage, segment)
                observing, before = self.phase(), self.live
                self.originals = {n: t for n, t in self.originals.items() if last[n] > number}
                forgotten = before - self.live
                held = self.solve(stage, segment, last)
                solving = self.phase()
                self.observed.clear()
            # In portions, the segment runs beside what is solved already, and only the last run forgets.
            again = [*(n.besides(held) for n in observing), *(n.besides(forgotten) for n in solving)]
            sizes = [observer.size for observer in observers]
            portions, needs = choose_portions(stage, sizes, [*observing, *solving], again, self.room)
            self.settle(needs, stage.inputs[0].weights[0], len(portions))
            self.portions.append(portions)
            self.calibration.add(self.again.flops, self.again.moved, len(portions) - 1)

    def calibrate(self, program: Program, stage: Stage, segment: Segment) -> None:
        times, of_all = Counter(self.turns), Counter(self.all)
        stored = sum(_bytes(self.values[shape]) for shape in self.turns)
        # A model has many layers of few kinds, and most of what planning takes would be their operators.
        reads = [value_forms(before[n] for n in segment.reads) for before in self.values.values()]
        statics = tuple(self.static_form(program, name) for name in segment.statics)
        key = (graph_form(stage, segment), statics, tuple(reads))
        ran = self.ran.get(key) or self.run_segment(program, stage, segment)
        self.ran[key] = ran
        self.need(self.live + ran.peak - self.samples, stored)
        running, growth, self.again = {}, {}, Work()
        # Batches of one shape take the same memory and work: one fake of each runs, and counts as often as it comes.
        for shape, run in zip(self.values, ran.runs, strict=True):
            before = self.values[shape]
            # The fakes of all shapes wait here at once; really, all batches do: `stored`.
            running[shape] = self.live + ran.statics + run.peak - self.samples
            # With the batch that follows, on its way.
            self.need(running[shape] + 2 * _bytes({n: before[n] for n in segment.reads}), 0)
            written = pytree.tree_unflatten(made(run.kept, [before[n] for n in segment.reads]), run.spec)
            waits = dict(zip((n for n in segment.writes if n in segment.keeps), written, strict=True))
            after = {n: waits[n] if n in waits else before[n] for n in segment.keeps}
            growth[shape] = _bytes(after) - _bytes(before)
            self.values[shape] = after
            del before, written, waits, after
            self.observed.append(torch.empty(run.left, dtype=torch.uint8, device=self.device))
            self.calibration.add(run.flops, run.moved, times[shape])
            self.again.add({d: n - run.observing.get(d, 0) for d, n in run.flops.items()}, run.moved, times[shape])
            for shared, seen in zip(stage.inputs, run.rows, strict=True):
                self.rows[shared.name] = self.rows.get(shared.name, 0) + of_all[shape] * seen // shared.experts
        # In the order of the real batches: what waits grows, or shrinks, with each one that has run.
        for shape in self.turns:
            self.need(running[shape], stored)
            stored += growth[shape]
            self.waiting = max(self.waiting, stored)

    def run_segment(self, program: Program, stage: Stage, segment: Segment) -> SegmentRuns:
        """What it takes; nothing is different afterwards."""
        with fake_observers(stage, segment, self.device, self.tracker) as observers:
            self.tracker.restart()
            start = self.live
            statics = [self.static(program, name) for name in segment.statics]
            peak, alive = self.tracker.peak[self.device.type] - start, self.live - start
            runs = []
            for before in self.values.values():
                self.tracker.restart()
                start = self.live
                written = run_segment(segment, before, statics)
                waits = {n: compact(v) for n, v in zip(segment.writes, written, strict=True) if n in segment.keeps}
                peak_of_run = self.tracker.peak[self.device.type] - start
                again = kept([before[n] for n in segment.reads], waits.values())
                spec = pytree.tree_structure(list(waits.values()))
                flops, moved = dict(self.tracker.flops), self.tracker.moved.total()
                del written, waits
                seen, observing = zip(*(observer.restart() for observer in observers), strict=True)
                left, of_observers = self.live - start, dict(sum(observing, Counter[torch.dtype]()))
                runs.append(Run(peak_of_run, left, again, spec, flops, moved, seen, of_observers))
            del statics
        return SegmentRuns(peak, alive, tuple(runs))

    def static_form(self, program: Program, placeholder: str) -> Any:
        """Equal for those that `static` makes in the same way."""
        of_original = twin_of(placeholder)
        if of_original is not None:
            original = self.originals[program.parameters[of_original]]
            return "original", original.is_meta, *value_forms([original])
        if placeholder in program.constants:
            return "constant", *value_forms([program.constants[placeholder]])
        name = program.buffers.get(placeholder) or program.parameters[placeholder]
        if name not in self.packed:
            return "dense", name in self.here, *value_forms([self.here.get(name, self.state[name])])
        recipe, dtype = self.settings[name].recipe, self.state[name].dtype
        return "packed", self.layouts[name], recipe, dtype, *value_forms(self.packed[name])

    def static(self, program: Program, placeholder: str) -> Any:
        """See `run_plan`."""
        of_original = twin_of(placeholder)
        if of_original is not None:
            original = self.originals[program.parameters[of_original]]
            return self.fake(original) if original.is_meta else original
        if placeholder in program.constants:
            value = program.constants[placeholder]
            return self.fake(value) if isinstance(value, Tensor) else value
        name = program.buffers.get(placeholder) or program.parameters[placeholder]
        if name not in self.packed:
            return self.dense(name)
        qdata, scale_zero, high_plane, perm = (
            torch.empty_like(t, device=self.device) if t is not None and t.is_meta else t for t in self.packed[name]
        )
        assert qdata is not None
        assert scale_zero is not None
        layout, dtype = self.layouts[name], self.state[name].dtype
        spec = layout.packed(self.settings[name].recipe)
        *_, n, k = spec.shape
        if cuda.in_one_pass(self.real_device, spec.bits, spec.group_size, k, dtype):
            weight = torch.empty(spec.shape, dtype=dtype, device=self.device)
            weight = weight if perm is None else weight[..., perm]
        else:
            packed = Packed(qdata, scale_zero, high_plane, perm, spec.bits, spec.group_size, n, k)
            weight = reference.dequantize(packed, dtype)
        return (weight.mT if layout.transposed else weight).reshape(layout.shape)

    def dense(self, name: str) -> Tensor:
        return self.here[name] if name in self.here else self.fake(self.state[name])

    def keep_original(self, name: str) -> None:
        """See `run_plan._Originals`. What is in files is read into host memory."""
        home, dense = self.weights.home(name), self.dense(name)
        here = (home or torch.device("cpu")).type == self.real_device.type
        self.originals[name] = dense if here else dense.to("meta")
        files = (n for n in self.originals if self.weights.home(n) is None)
        self.from_files = max(self.from_files, sum(self.originals[n].nbytes for n in files))

    def solve(self, stage: Stage, segment: Segment, last: Mapping[str, int]) -> int:
        """See `run_plan._Solving` and `solve_together`. Returns the bytes that two portions keep between them."""
        before, held = self.live, 0
        stored, samples = sum(_bytes(self.values[shape]) for shape in self.turns), self.samples
        left = Counter(name for shared in stage.inputs for name in shared.weights)
        matrices: dict[str, Tensor] = {}
        codes: Counter[str] = Counter()  # weight → bytes of its parts that are solved
        for shared in stage.inputs:
            for name in shared.weights:
                if name not in matrices:
                    matrices[name] = self.layouts[name].matrix(self.dense(name))
            pooled = 4 * shared.in_features**2 if shared.experts > 1 else 0
            kept = 0
            # Codes of other ranks arrive as one tensor, which becomes those of the parts.
            arriving = sum(self.codes_of(part) for part in shared.parts) if self.ranks.size > 1 else 0
            for cost in self.costs(shared, segment):
                self.need(self.live - samples + pooled + kept + codes.total() + max(cost.peak, 2 * arriving), stored)
                kept = cost.kept
                self.solving.add_solve(cost, -(-shared.experts // self.ranks.size))
            for part in shared.parts:
                codes[part.weight] += self.codes_of(part)
            held = max(held, self.live - before + pooled + codes.total())
            for name in shared.weights:
                left[name] -= 1
                if not left[name]:
                    if name in last:
                        self.keep_original(name)
                    joined = codes[name] if shared.experts > 1 else 0  # from those of the experts
                    self.need(self.live - samples + pooled + kept + codes.total() + joined, stored)
                    packing = self.pack(name)
                    self.need(packing - samples + pooled + kept + codes.total(), stored)
                    del matrices[name], codes[name]
        return held

    def codes_of(self, part: Part) -> int:
        return result_bytes(
            part.stop - part.start, self.layouts[part.weight].in_features, self.settings[part.weight].recipe
        )

    def costs(self, shared: SharedInput, segment: Segment) -> Iterator[SolveCost]:
        compensated = cast(FakeObserver, segment.module.get_submodule(shared.name)).compares
        alike: dict[Recipe, list[Part]] = {}
        for part in shared.expert(0):
            alike.setdefault(self.settings[part.weight].recipe, []).append(part)
        for recipe, parts in alike.items():
            rows = [p.stop - p.start for p in parts]
            # See `rows_of_each`; experts are solved whole.
            if shared.experts == 1:
                size = self.ranks.size
                rows = rows[::size] if recipe.adapter_rank else [-(-n // size) for n in rows]
            itemsize = self.state[parts[0].weight].dtype.itemsize
            cuda = self.real_device.type == "cuda"
            yield solve_cost(rows, shared.in_features, itemsize, recipe, compensated, cuda)

    def pack(self, name: str) -> int:
        """Put the quantized weight in place; the bytes that were alive at most."""
        spec = self.layouts[name].packed(self.settings[name].recipe)
        before = self.live
        # A model has many weights of few kinds, and packing takes dozens of operators.
        if spec not in self.packings:
            self.packings[spec] = self._packing(spec)
        parts, more = self.packings[spec]
        packed = tuple(None if t is None else torch.empty_like(t, device=self.device) for t in parts)
        self.packed_bytes[name] = sum(t.nbytes for t in packed if t is not None)
        self.here.pop(name, None)
        if not self.is_here(name, quantized=True):
            packed = tuple(None if t is None else t.to("meta") for t in packed)
        self.packed[name] = packed
        return before + more

    def _packing(self, spec: PackedSpec) -> tuple[PackedTensors, int]:
        """What comes out of packing such a weight, on meta, and the bytes that it takes meanwhile."""
        self.tracker.restart()
        before = self.live
        scale = torch.empty(spec.grid_shape, dtype=torch.float16, device=self.device)
        zero_point = torch.empty(spec.grid_shape, dtype=torch.uint8, device=self.device)
        perm = torch.empty(spec.shape[-1], dtype=torch.int32, device=self.device) if spec.permuted else None
        qdata, high_plane = pack_codes(torch.empty(spec.shape, dtype=torch.uint8, device=self.device), spec.bits)
        packed = (qdata, pack_scale_zero(scale, zero_point), high_plane, perm)
        parts = tuple(None if t is None else torch.empty_like(t, device="meta") for t in packed)
        return parts, self.tracker.peak[self.device.type] - before

    def round_all(self) -> None:
        """See `run_plan.round_all`."""
        for name, c in self.settings.items():
            layout = self.layouts[name]
            matrix = layout.matrix(self.dense(name))
            cost = solve_cost([layout.rows], layout.in_features, matrix.dtype.itemsize, c.recipe)
            self.need(self.live + cost.peak, 0)
            self.solving.add_solve(cost, 1)
            self.need(self.pack(name), 0)
            self.settle(self.phase())
            del matrix


def _bytes(values: Values) -> int:
    """Of all storages that tensors among the values keep alive."""
    found = {key: s.nbytes() for v in values.values() if isinstance(v, Tensor) for key, s in storages(v).items()}
    return sum(found.values())
