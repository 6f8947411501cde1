"""Replay: what takes over when torch.export cannot turn a model into one graph. Its own forwards run, in step.

Every calibration batch runs `model(...)` in a thread of its own, of which only one is awake at any time. A forward that
is about to multiply an activation by a weight that is not solved yet stops there. When all have stopped or ended, the
weight that comes first is solved on the activations that wait for it, its new values are put in place, and the forwards
go on.

So a layer sees inputs made by already quantized layers, as in the graph, each product runs once per batch, and control
flow may be any Python: branches on values, loops over the experts that were chosen, generators. (Replaying a model
block by block would have to know its blocks and what is passed between them, run each of them twice, and quantize the
weights within one block on unquantized inputs.) What it costs: one more forward per batch before, which finds the
weights (`passes/replay/find_products.py`); the model stays where it is; and all batches wait in the middle of a
forward, with what their frames hold.

A weight that is applied again later is solved at its first use. What the later use, or a batch that came to it too
late, would have added is left out, and the report says so.
"""

import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from gptq_ao.calibration.batches import Batch
from gptq_ao.errors import CalibrationError, CaptureError, GPTQError, NonFiniteError
from gptq_ao.model.inspection import output_heads
from gptq_ao.passes.find_linears import ROUTER, left_out_by_name
from gptq_ao.passes.linear_modules import linear_modules
from gptq_ao.passes.records import Excluded, LinearSite, Part, Selection
from gptq_ao.passes.replay.find_products import ProductFinder
from gptq_ao.passes.replay.padding import Padding
from gptq_ao.passes.replay.products import Parameters, Use, Watch
from gptq_ao.passes.tracing.calibration_mode import calibration_mode
from gptq_ao.pipeline.paused_forwards import Forward, ModuleState, forwards
from gptq_ao.pipeline.restorable import RestorableWeights
from gptq_ao.pipeline.run_plan import grids_of, rewrite
from gptq_ao.pipeline.solve_together import join_parts, solve_together
from gptq_ao.pipeline.solved_part import SolvedPart
from gptq_ao.planning.job import Job
from gptq_ao.report import Clock, WeightReport
from gptq_ao.solver.expert_hessians import ExpertHessians
from gptq_ao.solver.hessian import Hessian, HessianObserver

__all__ = ["Replayed", "find_products", "replay"]


@dataclass(frozen=True)
class Replayed:
    """What was done.

    Attributes:
        weights: in the order in which they were solved; their stages count Hessians.
        notes: what is less than a graph would have done.
    """

    weights: tuple[WeightReport, ...]
    hessians: int
    notes: tuple[str, ...]


def find_products(job: Job) -> tuple[tuple[LinearSite, ...], tuple[Excluded, ...]]:
    """Sites in the order to solve them in, and all other matrices with the reason: what `find_linears` gives of a
    graph. The weight of an nn.Linear that no batch reaches is a site too, without rows.

    Raises:
        CaptureError: the model cannot take the first batch.
    """
    model = job.model
    finder, heads = ProductFinder(Parameters(model)), output_heads(model)
    with calibration_mode(model), torch.compiler.set_stance("force_eager"):
        state = ModuleState(model)
        for number, batch in enumerate(job.batches or ()):
            batch = _on(job.device, batch)
            finder.start_batch(batch, f"calibration batch {number}")
            try:
                with finder:
                    model(*batch.args, **batch.kwargs)
            except GPTQError:
                raise
            except Exception as e:
                said = f"{type(e).__name__}: {e}{_suspicion(model, batch)}"
                if number == 0:
                    raise CaptureError(f"the model does not run on a calibration batch: {said}") from e
                raise CalibrationError(f"the model does not run on calibration batch {number}: {said}") from e
            finally:
                state.take()
            finder.end_batch()

    def left_out(site: LinearSite) -> str | None:
        by_name = left_out_by_name(site.weight, finder.embedded, heads)
        return by_name or (ROUTER if site.weight in finder.routers else site.left_out)

    reached = finder.sites()
    unreached = [s for s in linear_modules(model)[0] if s.weight not in finder.seen]
    sites = [
        *(LinearSite(s.weight, s.node, s.layout, s.part, s.rows, s.experts, left_out(s)) for s in reached),
        *(LinearSite(s.weight, s.node, s.layout, s.part, (), 1, s.left_out) for s in unreached),
    ]
    return tuple(sites), finder.excluded({s.weight for s in sites})


def replay(job: Job, weights: RestorableWeights, selection: Selection) -> Replayed:
    """Quantize what was selected.

    Raises:
        NonFiniteError, SolverError: as a run of a plan does. Whatever the model itself raises.
    """
    batches, clock = job.batches or [], job.clock
    run = _Run(job, weights, selection)
    with torch.no_grad(), clock("solve"):
        run.round_unreached(run.expected)  # first: nothing is done yet if `strict` forbids it
    calls = [partial(_call, run, _on(job.device, batch)) for batch in batches]
    with (
        calibration_mode(job.model),
        torch.compiler.set_stance("force_eager"),
        forwards(job.model, calls) as under_way,
    ):
        run.solve_all(under_way, job)
    with torch.no_grad(), clock("solve"):
        run.round_unreached(run.solved_on)  # experts that only the unquantized model chose
        return Replayed(tuple(run.finish()), run.hessians, run.notes(len(batches)))


@dataclass(frozen=True)
class _Product:
    """Where a forward waits."""

    use: Use
    counts: Tensor | None


class _Stops(Watch):
    """The mode of one forward: it stops at products with weights that are not solved."""

    def __init__(self, run: "_Run", forward: Forward, padding: Padding) -> None:
        super().__init__()
        self._run, self._forward, self._padding = run, forward, padding

    def before(self, func: Any, args: Any, kwargs: Any) -> None:
        self._forward.check()
        use = self._run.parameters.find(func, args, kwargs)
        if isinstance(use, Use) and self._run.wants(use.part, self._forward.number):
            # Rows that are taken out of the activation in another arrangement have no place in the mask any more.
            counts = self._padding.of(use.activation) if use.arrange is None else None
            self._forward.pause(_Product(use, counts))

    def after(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        self._padding.follow(func, args, out)


def _call(run: "_Run", batch: Batch, forward: Forward) -> None:
    with _Stops(run, forward, Padding(batch)):
        run.model(*batch.args, **batch.kwargs)


class _Run:
    """What the forwards have led to so far."""

    def __init__(self, job: Job, weights: RestorableWeights, selection: Selection) -> None:
        self.model, self.parameters, self._weights = weights.model, Parameters(weights.model), weights
        self.hessians = 0
        self._job, self._selection, self._config = job, selection, job.config
        self.expected = {Part(s.weight, *s.part): i for i, s in enumerate(selection.sites) if s.rows}  # → order
        self.solved_on: dict[Part, set[int]] = {}  # → numbers of batches
        self._solved: dict[str, list[SolvedPart]] = {}
        self._stages: dict[str, int] = {}
        self._again: Counter[str] = Counter()
        self._late: dict[str, set[int]] = {}
        self._shared: list[_Shared] = []

    def wants(self, part: Part, batch: int) -> bool:
        """Whether a product with it has to wait."""
        if part in self.expected and part not in self.solved_on:
            return True
        # It has its final values already. Nothing is left to do but to remember what its Hessian has missed.
        if batch in self.solved_on.get(part, ()):
            self._again[part.weight] += 1
        elif part.weight in self._selection.settings:
            self._late.setdefault(part.weight, set()).add(batch)
        return False

    def solve_all(self, under_way: list[Forward], job: Job) -> None:
        waiting = under_way
        with job.steps(len(self.expected), "weight") as steps:
            while True:
                for forward in waiting:
                    with job.clock("calibrate"):
                        forward.step()
                parts = [f.waits_for.use.part for f in under_way if f.waits_for is not None]
                if not parts:
                    return
                # The earliest in the order of use that any forward waits for: no forward can still come to it with
                # rows that were not counted, unless its own path is another one. Those that wait for others stay.
                part = min(parts, key=self.expected.__getitem__)
                waiting = [f for f in under_way if f.waits_for is not None and f.waits_for.use.part == part]
                with steps.step(part.weight.removesuffix(".weight")), torch.no_grad():
                    self._solve(part, waiting, job.clock)

    def round_unreached(self, reached_parts: Iterable[Part]) -> None:
        """Round to nearest what is in none of these parts, nor rounded already."""
        for name, layout in self._selection.layouts.items():
            known = {*reached_parts, *(s.part for s in self._solved.get(name, ()))}
            reached = sorted((p.start, p.stop) for p in known if p.weight == name)
            end = 0
            for start, stop in (*reached, (layout.rows, layout.rows)):
                if end < start:
                    self._solve_rows(Part(name, end, start), None, None)
                end = max(end, stop)

    def finish(self) -> list[WeightReport]:
        """Put quantized tensors in place of the parameters that have their values."""
        reports = []
        settings, layouts = self._selection.settings, self._selection.layouts
        for name in sorted(settings, key=lambda n: self._stages.get(n, 0)):
            matrix = layouts[name].matrix(self._weights.get(name))
            whole = join_parts(self._solved[name], matrix, settings[name])
            reports.append(rewrite(self._weights, layouts[name], whole, settings[name], self._stages.get(name, 0)))
        return reports

    def notes(self, batches: int) -> tuple[str, ...]:
        again = [
            f"{name} was applied {n} more times after it was solved; those rows are not in its Hessian"
            for name, n in self._again.items()
        ]
        late = [
            f"{name} was reached by {len(which)} of {batches} batches when (some of) its rows were solved already; "
            "their activations are not in its Hessian"
            for name, which in self._late.items()
        ]
        return (*again, *late)

    def _solve(self, part: Part, waiting: list[Forward], clock: Clock) -> None:
        with clock("calibrate"):
            hessians = self._hessians(part, waiting)
        with clock("solve"):
            n = (part.stop - part.start) // len(hessians)
            for expert in ExpertHessians(len(hessians), self._config.expert_min_rows).add(hessians):
                start = part.start + expert.number * n
                self._solve_rows(Part(part.weight, start, start + n), expert.hessian, expert.fallback)
        self.solved_on[part] = {f.number for f in waiting}
        self._stages[part.weight] = self.hessians

    def _solve_rows(self, part: Part, hessian: Hessian | None, why: str | None) -> None:
        """Solve, and write the new values where the old are: views of the parameter in waiting frames see them too."""
        parameter = self.model.get_parameter(part.weight).data
        layout = self._selection.layouts[part.weight]
        views = layout.views(parameter, part.start, part.stop)
        if hessian is None:  # no row reached it
            hessian = Hessian(torch.zeros((layout.in_features,) * 2, dtype=torch.float32, device=parameter.device), 0)
        (solved,) = solve_together(
            {part: torch.cat(views)},
            self._selection.settings,
            hessian,
            self._config.strict,
            why,
            grids=grids_of(self._job, [part]),
            heights={part.weight: layout.out_features},
        )
        self._weights.will_overwrite(part.weight)
        values = solved.dequantize().to(parameter.dtype)
        for view, new in zip(views, values.split([len(v) for v in views]), strict=True):
            view.copy_(new)
        self._solved.setdefault(part.weight, []).append(solved)

    def _hessians(self, part: Part, waiting: list[Forward]) -> tuple[Hessian, ...]:
        """Of the rows that wait; once for all weights that read the same activations, one after the other."""
        products = {f.number: f.waits_for for f in waiting}
        self._shared = [s for s in self._shared if s.alive]
        for shared in self._shared:
            if shared.fits(products):
                return shared.hessians
        experts = next(iter(products.values())).use.experts
        layout = self._selection.layouts[part.weight]
        observer = HessianObserver(layout.in_features, experts)
        for p in products.values():
            observer(p.use.rows, p.counts, p.use.offsets)
            observer.end_batch()
        hessians = observer.finish()
        bad = hessians[0].first_bad_batch
        if bad is not None:
            raise NonFiniteError(
                f"the input of {part.weight} is NaN or infinite in calibration batch {waiting[bad].number} (or its "
                "squares exceed fp32). Check that batch, or run the model in bf16 or fp32"
            )
        self.hessians += 1
        self._shared.append(_Shared(products, hessians))
        return hessians


class _Shared:
    """Hessians, and the activations that they are of, by batch."""

    def __init__(self, products: dict[int, _Product], hessians: tuple[Hessian, ...]) -> None:
        self.hessians = hessians
        self._keys = {number: _key(p.use) for number, p in products.items()}
        tensors = [t for p in products.values() for t in (p.use.activation, p.use.offsets) if t is not None]
        self._refs = [weakref.ref(t) for t in tensors]

    @property
    def alive(self) -> bool:
        """Whether another weight could still read all of the activations. (Their identity means nothing afterwards.)"""
        return all(ref() is not None for ref in self._refs)

    def fits(self, products: dict[int, _Product]) -> bool:
        counted = not any(p.use.activation.is_inference() for p in products.values())  # changes of others go unseen
        return counted and self._keys == {number: _key(p.use) for number, p in products.items()}


def _key(use: Use) -> tuple[Any, ...]:
    x = use.activation
    return id(x), None if x.is_inference() else x._version, use.arrange, id(use.offsets), use.experts


def _suspicion(model: nn.Module, batch: Batch) -> str:
    """What may be wrong with a batch that a model does not take."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    for t in batch.tensors():
        if t.is_floating_point() and len(dtypes) == 1 and t.dtype not in dtypes:
            return f"\nAn input is {t.dtype}, and the model is {dtypes.pop()}: convert one of them"
        if not t.is_floating_point() and t.dim() == 1:
            return f"\nAn input has one dimension, {tuple(t.shape)}: is that of the batch missing? tensor.unsqueeze(0)"
    return ""


def _on(device: torch.device, batch: Batch) -> Batch:
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.to(device), (batch.args, batch.kwargs))
    return Batch(args, kwargs)
