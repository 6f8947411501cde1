"""Model + config → what will be done: the passes in order, up to the first computation.

batches → capture → canonicalize → check_batches → find_linears → choose_weights → schedule → observe

`quantize_` carries it out, `plan` describes it. No weight is read here.
"""

import dataclasses
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from gptq_ao.config import GPTQConfig
from gptq_ao.errors import FusedSettingsWarning, StrictError
from gptq_ao.model.adapters import adapter_names
from gptq_ao.model.inspection import output_heads
from gptq_ao.passes.canonicalize import canonicalize
from gptq_ao.passes.capture import capture
from gptq_ao.passes.check_batches import check_dtypes, check_lookups
from gptq_ao.passes.choose_weights import choose_weights
from gptq_ao.passes.find_linears import find_linears
from gptq_ao.passes.follow_original import follow_original
from gptq_ao.passes.linear_modules import linear_modules
from gptq_ao.passes.observe import observe
from gptq_ao.passes.products.adapters import with_adapters
from gptq_ao.passes.products.fused_sets import mixed_sets
from gptq_ao.passes.reach_all_experts import reach_all_experts
from gptq_ao.passes.records import Excluded, LinearSite, Plan, Program, Selection
from gptq_ao.passes.schedule import schedule
from gptq_ao.passes.tracing.stand_in import first_names
from gptq_ao.planning.job import Job

__all__ = [
    "Calibrated",
    "Found",
    "Prepared",
    "check_support",
    "prepare",
    "select",
    "with_selection",
]


@dataclass(frozen=True)
class Found:
    """The graph as the model computes it, and all products in it, those that will not be quantized included."""

    program: Program
    sites: tuple[LinearSite, ...]


@dataclass(frozen=True)
class Calibrated:
    """What runs: the graph, cut into stages, and the calibration batches by placeholder name."""

    program: Program
    plan: Plan
    batches: tuple[dict[str, Tensor], ...]


@dataclass(frozen=True)
class Prepared:
    """What will be done, and nothing done yet.

    Attributes:
        device: where it computes.
        mixed: sets of weights that engines fuse and whose settings differ, see `passes/products/fused_sets.py`.
        calibrated: None if every weight is rounded to nearest, for which nothing runs.
        found: None without data.
    """

    selection: Selection
    device: torch.device
    mixed: tuple[str, ...]
    calibrated: Calibrated | None
    found: Found | None = None

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(f"fused by inference engines, with different settings: {line}" for line in self.mixed)

    def warn(self, deeper: int = 0) -> None:
        """One warning for all sets, at the line that called `quantize_`, `quantize_checkpoint` or `plan`."""
        if self.mixed:
            warnings.warn(
                "these weights are fused by inference engines such as vLLM and SGLang, which then want the same "
                "settings for all of a set:\n  " + "\n  ".join(self.mixed),
                FusedSettingsWarning,
                stacklevel=4 + deeper,  # this, what does the work, what is public
            )


def prepare(job: Job) -> Prepared:
    """Everything that can be wrong with the settings, the data or the model's form is raised here; see `quantize_`."""
    model, config, batches, clock = job.model, job.config, job.batches, job.clock
    if batches is None:
        with clock("plan"):
            sites, excluded = linear_modules(model)
            selection = select(job, sites, excluded)
        return Prepared(selection, job.weights.device, mixed_sets(sites, selection, model), None)

    with clock("capture"):
        # Captured where the weights say that the model is, since it may look at their device; then moved in the graph
        # to the one that computes.
        program = canonicalize(capture(model, batches[0], job.weights.device, batches[1:]), job.device)
    with clock("plan"):
        check_dtypes(program)
        bound = tuple(program.bind(batch, f"calibration batch {i}") for i, batch in enumerate(batches))
        check_lookups(program, bound, job.weights.get)
        sites, excluded = find_linears(program, output_heads(model))
        found = Found(program, sites)
        # For the Hessians only: `found` keeps the graph that computes what the model does.
        if config.calibrate_all_experts:
            program, sites = reach_all_experts(program, sites)
        selection = select(job, sites, excluded)
        check_support(config, selection)
        calibrated = _calibrated(program, selection, bound)
    where = job.device if calibrated else job.weights.device
    return Prepared(selection, where, mixed_sets(sites, selection, model), calibrated, found)


def select(job: Job, sites: tuple[LinearSite, ...], excluded: tuple[Excluded, ...]) -> Selection:
    """What will be quantized, and how; see `choose_weights` and `with_adapters`."""
    names, adapters = first_names(job.model), adapter_names(job.model)
    selection = choose_weights(sites, excluded, job.config, job.wanted, names, adapters, job.lenient)
    return with_adapters(selection, job.model)


def with_selection(job: Job, prepared: Prepared, selection: Selection) -> Prepared:
    """The same graph and data, for another selection of its sites or other settings."""
    assert prepared.calibrated is not None
    assert prepared.found is not None
    calibrated = _calibrated(prepared.calibrated.program, selection, prepared.calibrated.batches)
    mixed = mixed_sets(prepared.found.sites, selection, job.model)
    return dataclasses.replace(prepared, selection=selection, mixed=mixed, calibrated=calibrated)


def _calibrated(program: Program, selection: Selection, batches: tuple[dict[str, Tensor], ...]) -> Calibrated | None:
    if all(c.method == "rtn" for c in selection.settings.values()):
        return None
    planned = schedule(program, selection)
    if any(c.recipe.compensates for c in selection.settings.values()):
        planned = follow_original(program, planned)
    return Calibrated(program, observe(planned), batches)


def check_support(config: GPTQConfig, selection: Selection) -> None:
    """With `strict`, no weight may be left as it is for want of support."""
    missed = [e for e in selection.excluded if not e.expected]
    if config.strict and missed:
        listing = "\n".join(f"  {e.weight}: {e.reason}" for e in missed)
        raise StrictError(
            f"strict=True, and these weights would be left as they are:\n{listing}\nExclude them by a rule "
            "(name: None) to say that this is meant"
        )
