"""Automatic precision: the bits of every weight, so that all of them fit `target_bits` and harm the model least.

    GPTQ of every weight at every candidate → the harm that its errors do → the cheapest choice that fits

Candidates are solved under the original model's activations, with few tries for scales and without refinement. Of the
candidate nearest the target, the expected harm of the errors is measured by gradients (`passes/expected_harm.py`): for
a language model, the KL divergence in nats per token. That of the others is in proportion to their squared output error
tr(E·H·Eᵀ), since all errors of a weight are alike but for their size.

Weights that engines fuse are one unit, which gets the same bits. `allocate.py` chooses among all units' candidates.

Source: Dong et al., "HAWQ-V2" (2020), which weighs the squared error of a layer's weights by the mean of the curvature.
Here the curvature is taken along the errors themselves.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from functools import partial

import torch
from torch import Tensor, nn

from gptq_ao.calibration.activation_store import ActivationStore
from gptq_ao.config import EFFORTS, UNCHANGED, GPTQConfig
from gptq_ao.distributed.ranks import Ranks
from gptq_ao.errors import ConfigError
from gptq_ao.model.weights import ModelWeights
from gptq_ao.passes.calibrate import calibrate
from gptq_ao.passes.expected_harm import expected_harm
from gptq_ao.passes.products.fused_sets import fused_sets
from gptq_ao.passes.records import Excluded, Selection, SharedInput
from gptq_ao.pipeline.allocate import allocate
from gptq_ao.pipeline.run_plan import static_value
from gptq_ao.pipeline.solve_together import solve_together
from gptq_ao.pipeline.solved_part import SolvedPart
from gptq_ao.pipeline.spread import each_expert
from gptq_ao.planning.job import Job
from gptq_ao.planning.memory import allot
from gptq_ao.planning.prepare import Prepared, with_selection
from gptq_ao.report import Choice, Decision, Unit
from gptq_ao.solver.expert_hessians import ExpertHessian, ExpertHessians

__all__ = ["check_possible", "choose_precision", "with_precision"]

LEFT = "automatic precision: left at 16 bits"


def check_possible(job: Job) -> None:
    """Find what keeps a backward of the whole model from running, before anything is done.

    Raises:
        ConfigError: the weights are not all in memory, or there is a limit to the device's that cannot be kept.
    """
    if not isinstance(job.weights, ModelWeights):
        raise ConfigError(
            "target_bits takes a backward of the whole model, so it cannot be streamed: load the model and use "
            "quantize_, or give bits instead"
        )
    away = next((name for name, p in job.model.named_parameters() if p.is_meta), None)
    if away is not None:
        raise ConfigError(
            f"target_bits takes a backward of the whole model, and {away!r} is offloaded or not loaded (it is on "
            "meta): load the model without offloading, or give bits instead"
        )
    if job.limits.device is not None:
        raise ConfigError(
            "target_bits takes a backward of the whole model, for which max_memory of the device cannot be kept: give "
            "max_memory for 'cpu' only, or bits instead of target_bits"
        )


def choose_precision(job: Job, prepared: Prepared) -> tuple[Decision, ...]:
    """Choose the bits of all weights whose settings have `target_bits`. Reads the weights and changes nothing.

    Raises:
        ConfigError: nothing is left to choose for; the target is smaller than the smallest candidates take; there are
            no gradients (see `expected_harm`).
        NonFiniteError, SolverError: see each message.
    """
    settings = {n: c for n, c in prepared.selection.settings.items() if c.target_bits is not None}
    if not settings:
        raise ConfigError("target_bits has nothing to choose: rules give every weight its bits. Leave it out")
    sites = tuple(s for s in prepared.selection.sites if s.weight in settings)
    costs = _costs(job, prepared, Selection(sites, settings, ()))
    units = _units(job.model, prepared, settings, costs)
    counts = [sum(job.model.get_parameter(name).numel() for name in unit.names) for unit in units]
    chosen = allocate(units, _budget(job.config, units, sum(counts)))
    return tuple(Decision(*each) for each in zip(units, chosen, counts, strict=True))


def with_precision(job: Job, prepared: Prepared, decisions: Sequence[Decision]) -> Prepared:
    """`prepared` with the bits that were chosen in place of `target_bits`.

    Raises:
        ConfigError: nothing is left to quantize.
    """
    bits = {name: decision.chosen.bits for decision in decisions for name in decision.unit.names}
    selection = _with_bits(prepared.selection, bits)
    if not selection.settings:
        raise ConfigError(
            f"target_bits={job.config.target_bits} leaves every weight as it is: nothing would be quantized. Give less"
        )
    return with_selection(job, prepared, selection)


def _units(
    model: nn.Module,
    prepared: Prepared,
    settings: Mapping[str, GPTQConfig],
    costs: Mapping[tuple[str, int], float],
) -> list[Unit]:
    """In the order in which the weights are used."""
    assert prepared.found is not None
    sets = [tuple(n for n in names if n in settings) for names in fused_sets(prepared.found.sites)]
    together = {name: names for names in sets for name in names}
    # In the order of first use, each set once, however many of its weights follow.
    units = dict.fromkeys(together.get(name, (name,)) for name in settings)

    def size(name: str, bits: int) -> int:
        if bits == UNCHANGED:
            return model.get_parameter(name).nbytes
        recipe = dataclasses.replace(settings[name].recipe, bits=bits)
        return prepared.selection.layouts[name].packed(recipe).nbytes

    return [
        Unit(
            names,
            tuple(
                Choice(bits, sum(size(name, bits) for name in names), sum(costs[name, bits] for name in names))
                for bits in settings[names[0]].candidates
            ),
        )
        for names in units
    ]


def _budget(config: GPTQConfig, units: Sequence[Unit], count: int) -> int:
    """Bytes for `count` weights."""
    assert config.target_bits is not None
    # Exactly: the product in floating point may be a byte more than what was asked for.
    budget = math.floor(Fraction(config.target_bits) * count / 8)
    smallest = sum(min(choice.size for choice in unit.choices) for unit in units)
    least = 8 * smallest / count
    if smallest > budget:
        raise ConfigError(
            f"target_bits={config.target_bits} counts scales, zero points and padding, with which the smallest "
            f"candidates take {least:.4f} bits per weight: give {math.ceil(1000 * least) / 1000} or more, allow "
            "fewer bits, or use a larger group_size"
        )
    return budget


def _with_bits(selection: Selection, bits: Mapping[str, int]) -> Selection:
    settings = {
        name: dataclasses.replace(c, bits=bits[name], target_bits=None) if name in bits else c
        for name, c in selection.settings.items()
        if bits.get(name) != UNCHANGED
    }
    left = tuple(Excluded(name, LEFT, expected=True) for name, b in bits.items() if b == UNCHANGED)
    sites = tuple(s for s in selection.sites if s.weight in settings)
    return Selection(sites, settings, (*selection.excluded, *left))


def _costs(job: Job, prepared: Prepared, selection: Selection) -> dict[tuple[str, int], float]:
    """(weight, bits) → cost."""
    target = job.config.target_bits
    assert target is not None
    typical = min((b for b in job.config.candidates if b != UNCHANGED), key=lambda b: abs(b - target))
    measured = with_selection(job, prepared, dataclasses.replace(selection, settings=_cheap(selection.settings)))
    energies, errors = _round(job, measured, typical)
    assert measured.found is not None
    assert measured.calibrated is not None
    program = measured.found.program
    harm = expected_harm(
        program,
        selection.layouts,
        errors,
        measured.calibrated.batches,
        partial(static_value, job, program),
        job.device,
        job.ranks,
    )
    # Measured at `typical` bits only, since a backward for every width would cost as much again: the errors of other
    # widths point in the same directions and differ in size. Of a weight that no data reached, all are zero.
    return {(name, b): harm[name] * e / (energies[name, typical] or 1.0) for (name, b), e in energies.items()}


def _cheap(settings: Mapping[str, GPTQConfig]) -> dict[str, GPTQConfig]:
    most = EFFORTS["fast"]["scale_candidates"]
    return {
        name: dataclasses.replace(
            c, scale_candidates=min(c.scale_candidates, most), refine_sweeps=0, compensate="none", adapter_rank=0
        )
        for name, c in settings.items()
    }


def _round(job: Job, measured: Prepared, typical: int) -> tuple[dict[tuple[str, int], float], dict[str, Tensor]]:
    """Solve every weight at every candidate, with the original model's activations.

    Returns:
        (weight, bits) → tr(E·H·Eᵀ) over all rows, and weight → E [rows, in_features] at `typical` bits, in the dtype
        and on the device of the weight.
    """
    calibrated, settings, layouts = measured.calibrated, measured.selection.settings, measured.selection.layouts
    assert calibrated is not None
    weights, program, plan = job.weights, calibrated.program, calibrated.plan
    # All widths are solved on the same Hessian, which is collected once.
    by_bits = {
        bits: {name: dataclasses.replace(c, bits=bits, target_bits=None) for name, c in settings.items()}
        for bits in job.config.candidates
        if bits != UNCHANGED
    }
    energies = dict.fromkeys(((name, bits) for name in settings for bits in job.config.candidates), 0.0)
    errors: dict[str, Tensor] = {}
    allotted = allot(job, measured)
    static = partial(static_value, job, program)

    def solve(
        shared: SharedInput,
        matrices: Mapping[str, Tensor],
        chosen: Mapping[str, GPTQConfig],
        expert: ExpertHessian,
        ranks: Ranks,
    ) -> Iterator[SolvedPart]:
        rows = {p: matrices[p.weight][p.start : p.stop] for p in shared.expert(expert.number)}
        yield from solve_together(rows, chosen, expert.hessian, job.config.strict, expert.fallback, ranks=ranks)

    def judge(shared: SharedInput, experts: list[ExpertHessian]) -> None:
        matrices = {n: layouts[n].matrix(weights.get(n, job.device)) for n in shared.weights}
        for n, matrix in matrices.items():
            errors.setdefault(n, torch.zeros_like(matrix, device=weights.home(n)))
        for bits, chosen in by_bits.items():
            solved = partial(solve, shared, matrices, chosen)
            for part in each_expert(job.ranks, experts, solved, job.device, single=shared.experts == 1):
                p = part.part
                energies[p.weight, bits] += part.changed or 0.0
                if bits == typical:
                    rows = matrices[p.weight][p.start : p.stop]
                    errors[p.weight][p.start : p.stop] = rows - part.solution.dequantize()

    with (
        ActivationStore(job.ranks.share(calibrated.batches), job.device, allotted.budget) as store,
        job.steps(len(plan.stages), "stage") as steps,
        torch.no_grad(),
    ):
        for stage, segment, portions in zip(plan.stages, plan.segments, allotted.portions, strict=True):
            with steps.step(f"measure {stage.inputs[0].weights[0].removesuffix('.weight')}"):
                known = [ExpertHessians(shared.experts, job.config.expert_min_rows) for shared in stage.inputs]
                for turn, portion in enumerate(portions, 1):
                    last = turn == len(portions)
                    hessians = calibrate(segment, stage, store, static, job.ranks, portion, last=last)
                    for shared, of_shared, new in zip(stage.inputs, known, hessians, strict=True):
                        if new:
                            judge(shared, of_shared.add(new))
                    del hessians, new
    return energies, errors
