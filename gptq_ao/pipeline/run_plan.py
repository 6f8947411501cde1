"""The stages of a plan, one after the other: observe what reaches the weights, solve them, put the results in place."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gptq_ao.adapter import LowRank
from gptq_ao.calibration.activation_store import ActivationStore
from gptq_ao.config import GPTQConfig
from gptq_ao.distributed.ranks import Ranks
from gptq_ao.model.weights import Weights
from gptq_ao.passes.calibrate import calibrate, run_only
from gptq_ao.passes.follow_original import last_reads
from gptq_ao.passes.records import Layout, Part, Plan, Portion, Program, Segment, Selection, SharedInput, Stage, twin_of
from gptq_ao.pipeline.journaled import JournaledStages
from gptq_ao.pipeline.solve_together import join_parts, round_matrix, solve_together
from gptq_ao.pipeline.solved_part import SolvedPart
from gptq_ao.pipeline.spread import each_expert
from gptq_ao.planning.job import Job
from gptq_ao.planning.prepare import Calibrated
from gptq_ao.report import WeightReport
from gptq_ao.solver.expert_hessians import ExpertHessian, ExpertHessians
from gptq_ao.solver.hessian import Hessian
from gptq_ao.tensor import GroupTensor, tensor_class

__all__ = ["grids_of", "rewrite", "round_all", "run_plan", "static_value"]


def run_plan(
    job: Job, calibrated: Calibrated, store: ActivationStore, portions: Sequence[Sequence[Portion]]
) -> list[WeightReport]:
    """Quantize with the plan's stages in order, each in its portions; one segment's weights at a time are on the device
    that computes."""
    weights, program, plan = job.weights, calibrated.program, calibrated.plan
    settings, layouts = plan.selection.settings, plan.selection.layouts
    done: list[WeightReport] = []
    adapters: dict[str, LowRank] = {}
    journal = JournaledStages(job, plan)
    originals = _Originals(program, plan)
    parameters = program.parameters
    last = {parameters[s]: n for n, g in enumerate(plan.segments, 1) for s in g.statics if s in parameters}

    def static(name: str) -> Any:
        placeholder = twin_of(name)
        if placeholder is not None:
            return originals[program.parameters[placeholder]].to(job.device)
        value, adapter = static_value(job, program, name), adapters.get(program.parameters.get(name, ""))
        if adapter is None:
            return value
        layout = layouts[program.parameters[name]]
        changes = adapter.dense().split(layout.out_features)
        for view, change in zip(layout.views(value, 0, layout.rows), changes, strict=True):
            view.add_(change.to(view))  # what was dequantized belongs to nobody else
        return value

    def put(whole: SolvedPart, number: int) -> None:
        name = whole.part.weight
        originals.keep(name, weights)
        done.append(rewrite(weights, layouts[name], whole, settings[name], number))
        if done[-1].adapter is not None:
            adapters[name] = done[-1].adapter

    def forget(number: int) -> None:  # before solving, which needs the room
        originals.forget(number)
        for each in done:
            if last.get(each.name, 0) <= number:
                weights.release(each.name)

    def solve(number: int, stage: Stage, segment: Segment) -> None:
        solving, of_stage = _Solving(job, plan, stage), portions[number - 1]
        for turn, portion in enumerate(of_stage, 1):
            last_turn = turn == len(of_stage)
            with job.clock("calibrate"):
                hessians = calibrate(segment, stage, store, static, job.ranks, portion, last=last_turn)
                if last_turn:
                    forget(number)
            with job.clock("solve"), torch.no_grad():
                for whole in solving.add(portion, hessians):
                    journal.add(number, whole, settings[whole.part.weight])
                    put(whole, number)
                    del whole
            del hessians  # the next run of the segment needs the room

    journal.start()
    with job.steps(len(plan.stages), "stage") as steps:
        for number, (stage, segment) in enumerate(zip(plan.stages, plan.segments, strict=True), 1):
            with steps.step(stage.inputs[0].weights[0].removesuffix(".weight")):
                if journal.has(number):
                    with job.clock("calibrate"):
                        if number > journal.skipped:
                            run_only(segment, store, static, job.ranks)
                        forget(number)
                    with job.clock("solve"), torch.no_grad():
                        for whole in journal.solved(number):
                            put(whole, number)
                            del whole  # the next segment needs the room
                else:
                    solve(number, stage, segment)
                journal.finish(number, store, segment)
    return done


def round_all(job: Job, selection: Selection) -> list[WeightReport]:
    """Round every chosen weight to nearest."""
    done, layouts = [], selection.layouts
    with job.clock("solve"), torch.no_grad(), job.steps(len(selection.settings), "weight") as steps:
        for name, c in selection.settings.items():
            with steps.step(name.removesuffix(".weight")):
                solved = round_matrix(name, layouts[name].matrix(job.weights.get(name)), c, job.grids(name))
                done.append(rewrite(job.weights, layouts[name], solved, c, stage=0))
                job.weights.release(name)
    return done


def rewrite(weights: Weights, layout: Layout, solved: SolvedPart, config: GPTQConfig, stage: int) -> WeightReport:
    """Pack a whole weight's solution and put it in place of the parameter, which has its layout."""
    name, s = solved.part.weight, solved.solution
    parameter, spec = weights.model.get_parameter(name), layout.packed(config.recipe)
    packed = tensor_class(spec.bits).from_codes(
        s.codes.view(spec.shape),
        s.scale.view(spec.grid_shape),
        s.zero_point.view(spec.grid_shape),
        dtype=parameter.dtype,
        perm=s.perm,
        transposed=layout.transposed,
        view_shape=layout.view_shape,
    )
    weights.replace(name, packed)
    return WeightReport(
        name=name,
        shape=tuple(parameter.shape),
        bits=spec.bits,
        group_size=spec.group_size,
        method=solved.method,
        stage=stage,
        rows=solved.rows,
        expert_rows=tuple(solved.expert_rows),
        damp=solved.damp,
        dead=solved.dead,
        error=solved.error,
        bytes=sum(getattr(packed, n).nbytes for n in packed.__tensor_flatten__()[0]),
        original_bytes=parameter.nbytes,
        fallback=solved.fallback,
        adapter=None
        if solved.adapter is None
        else LowRank(solved.adapter.A.cpu().contiguous(), solved.adapter.B.cpu().contiguous()),
    )


class _Solving:
    """A stage's weights, on the way from their Hessians to their solutions."""

    def __init__(self, job: Job, plan: Plan, stage: Stage) -> None:
        self._job, self._stage = job, stage
        self._layouts, self._settings = plan.selection.layouts, plan.selection.settings
        self._heights = {name: layout.out_features for name, layout in self._layouts.items()}
        # A weight may be in several of the stage's inputs, by its parts, and in each of them once per expert.
        inputs, min_rows = stage.inputs, job.config.expert_min_rows
        self._missing = Counter(p.weight for shared in inputs for p in shared.parts for _ in range(shared.experts))
        self._matrices: dict[str, Tensor] = {}
        self._solved: dict[str, list[SolvedPart]] = {}
        self._hessians = [ExpertHessians(shared.experts, min_rows) for shared in inputs]

    def add(self, portion: Portion, hessians: tuple[tuple[Hessian, ...], ...]) -> Iterator[SolvedPart]:
        """Solve what can be solved with these Hessians. Each weight, as soon as the last of its parts is solved."""
        job, everything = self._job, zip(self._stage.inputs, self._hessians, portion, hessians, strict=True)
        for shared, known, experts, of_portion in everything:
            if not experts:
                continue
            for name in shared.weights:
                if name not in self._matrices:
                    self._matrices[name] = self._layouts[name].matrix(job.weights.get(name, job.device))
            ready, solve = known.add(of_portion), partial(self._solve, shared)
            for part in each_expert(job.ranks, ready, solve, job.device, single=shared.experts == 1):
                name = part.part.weight
                self._solved.setdefault(name, []).append(part)
                self._missing[name] -= 1
                if not self._missing[name]:  # at once: what is packed takes a fraction of the room
                    yield join_parts(self._solved.pop(name), self._matrices.pop(name), self._settings[name])

    def _solve(self, shared: SharedInput, expert: ExpertHessian, ranks: Ranks) -> Iterator[SolvedPart]:
        rows = {p: self._matrices[p.weight][p.start : p.stop] for p in shared.expert(expert.number)}
        strict, grids = self._job.config.strict, grids_of(self._job, rows)
        streams, heights = tuple(p for p, _ in shared.residuals), self._heights
        solved = solve_together(
            rows, self._settings, expert.hessian, strict, expert.fallback, streams, grids, heights, ranks
        )
        own = (expert.rows,) if shared.experts > 1 else ()
        yield from (dataclasses.replace(part, expert_rows=own) for part in solved)


def grids_of(job: Job, parts: Iterable[Part]) -> dict[Part, tuple[Tensor, Tensor]]:
    """What `job.grids` has of these parts."""
    found = ((part, job.grids(part.weight)) for part in parts)
    return {p: (grid[0][p.start : p.stop], grid[1][p.start : p.stop]) for p, grid in found if grid is not None}


class _Originals:
    """The weights as they were, from when they are replaced until the last segment that reads them has run."""

    def __init__(self, program: Program, plan: Plan) -> None:
        self._last = last_reads(program, plan)
        self._kept: dict[str, Tensor] = {}

    def keep(self, name: str, weights: Weights) -> None:
        if name in self._last:
            self._kept[name] = weights.get(name)

    def forget(self, segment: int) -> None:
        self._kept = {n: t for n, t in self._kept.items() if self._last[n] > segment}

    def __getitem__(self, name: str) -> Tensor:
        return self._kept[name]


def static_value(job: Job, program: Program, name: str) -> Any:
    """A parameter, buffer or constant of the graph, on the device that computes."""
    if name in program.constants:
        value = program.constants[name]
        return value.to(job.device) if isinstance(value, Tensor) else value
    value = job.weights.get(program.buffers.get(name) or program.parameters[name], job.device)
    # Dequantized once per segment, not once per batch: it is what the weight's own product does for many rows.
    return value.dequantize() if isinstance(value, GroupTensor) else value
