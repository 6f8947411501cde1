"""quantize_: the one place that strings the stages together.

prepare → (with target_bits: choose the precision) → per stage: calibrate → solve → rewrite
"""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import torch
from torch import nn
from torchao.core.config import AOBaseConfig

from gptq_ao.calibration.activation_store import ActivationStore
from gptq_ao.calibration.advice import advice_on_rows, advice_on_text
from gptq_ao.calibration.batches import Batch, digest
from gptq_ao.checkpoint.origin import Origin, origin_of, requantized
from gptq_ao.config import GPTQConfig
from gptq_ao.distributed.ranks import Ranks
from gptq_ao.errors import CaptureError, ConfigError, StrictError, TrainingWarning
from gptq_ao.journal.journal import Journal
from gptq_ao.model.ambient import own_precision
from gptq_ao.model.parts import FsdpParameters
from gptq_ao.model.sharded import check_gatherable, shard_in
from gptq_ao.model.unwrap import same_forward
from gptq_ao.model.weights import ModelWeights
from gptq_ao.passes.observe import uncompensated
from gptq_ao.passes.products.adapters import without_adapters
from gptq_ao.passes.products.fused_sets import mixed_sets
from gptq_ao.passes.products.group_sizes import smaller_groups
from gptq_ao.passes.records import Selection
from gptq_ao.pipeline.agreement import check_agreement, with_all_ranks
from gptq_ao.pipeline.journaled import (
    begin,
    decided,
    facts_of_values,
    notes_of_journal,
    waiting_batches,
    write_decisions,
)
from gptq_ao.pipeline.precision import check_possible, choose_precision, with_precision
from gptq_ao.pipeline.replay import find_products, replay
from gptq_ao.pipeline.restorable import RestorableWeights
from gptq_ao.pipeline.run_plan import round_all, run_plan
from gptq_ao.pipeline.sharded_weights import ShardedWeights
from gptq_ao.pipeline.training_code import left_behind, ranks_apart
from gptq_ao.planning.job import FilterFn, Job
from gptq_ao.planning.limits import Limits, MaxMemory
from gptq_ao.planning.memory import allot, free_bytes, peak_bytes
from gptq_ao.planning.output_bytes import result_size
from gptq_ao.planning.portions import note_of
from gptq_ao.planning.prepare import Prepared, check_support, prepare, select
from gptq_ao.progress import Progress
from gptq_ao.quality.check import QualityCheck, compared
from gptq_ao.report import Decision, Report, WeightReport, names_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["quantize_", "quantize_weights"]


def quantize_(
    model: nn.Module,
    config: AOBaseConfig,
    filter_fn: FilterFn | None = None,
    device: torch.device | str | None = None,
    *,
    max_memory: MaxMemory | None = None,
    progress: Progress | None = None,
    distributed: bool = False,
    process_group: "ProcessGroup | None" = None,
    journal: str | Path | Journal | None = None,
    snapshot_every: int = 0,
    quality: QualityCheck | None = None,
) -> Report | None:
    """Quantize the weights of `model`, in place. The modules stay what they are; only parameters are replaced. Wrappers
    that change no result (torch.compile, DataParallel, checkpoint_wrapper and their like), the caller's autocast and
    inference mode make no difference. A TrainingWarning says if an optimizer holds parameters that are replaced, or if
    several ranks calibrate, each by itself. Whatever is raised, the model is as it was, unless a note on the exception
    says that there was no room to keep the weights that had been replaced: then the model has to be loaded again.

    Args:
        config: from `gptq_config`. Any other torchao config is handed to `torchao.quantization.quantize_`.
        filter_fn: `(module, name) -> bool`, which modules' weights to quantize; None: all that config selects.
        device: where to compute, one segment's weights at a time. None: where the model is. Each weight ends up on
            the device it came from.
        max_memory: `{"cuda": "8GiB", "cpu": "32GiB"}`, in bytes or with a unit. For the device that computes: all that
            is on it. For "cpu": the activations of calibration data that wait in host memory. What exceeds the first
            goes to host memory, what exceeds the second to temporary files; the result is the same. None: what is
            free on the device, then on the host.
        progress: `(stage, of, name, seconds)`, called whenever a stage is done, in place of the bar on a terminal: its
            number, counted from 1, of how many, the first of its weights, and the seconds since the first stage began.
            Automatic precision (`target_bits`) counts twice, once while it measures. Rank 0 is told, for all.
        distributed: quantize together with all ranks of torch.distributed, which is initialized: each has the whole
            model and all batches, runs a share of the batches, solves a share of the weights, and ends with the same
            quantized model and the same report. What one rank raises, all raise, with its number. `device` and
            `max_memory` are for each rank. A model that `fully_shard` (FSDP2) or tensor parallelism has spread over
            these ranks stays so: a weight is whole while it runs or is solved, and each rank ends with its part.
        process_group: those of this group, in place of all.
        journal: a directory, empty or missing, to keep what is finished in: the solved weights of each stage, as much
            as the quantized weights take, and the choice that `target_bits` is for. If there is the journal of such a
            run already, this one goes on after its last finished stage, with the same result; see docs/large-models.md.
            It stays when all is done, until you have saved the model and remove it. None: nothing is kept. Of several
            ranks the first keeps it.
        snapshot_every: after so many stages the journal keeps the activations that wait, too, in place of those before:
            what comes before them need not run again. 0: never. Not for several ranks.
        quality: what the quantized model has to keep to, on text that it is not calibrated on: the original predicts
            before the first weight changes, and `report.quality` says how far they are apart. Not for several ranks.

    Returns:
        What was done, per weight; None for another library's config.

    Raises:
        CalibrationError, CaptureError, ConfigError, NoLinearError: model, data or settings do not fit.
        NonFiniteError, QualityError, RankError, SolverError, StrictError: see each message.
        CheckpointError: the journal is damaged or in use, or cannot be written. (That of another run is a ConfigError.)
    """
    if not isinstance(config, GPTQConfig):
        import torchao.quantization

        given = {} if filter_fn is None else {"filter_fn": filter_fn}
        torchao.quantization.quantize_(model, config, device=device, **given)
        return None
    managed = FsdpParameters(model)
    model = same_forward(model, whole=not distributed and process_group is None)
    parameters = WeakValueDictionary(model.named_parameters())
    on_gpu = next((p.device for p in model.parameters() if p.is_cuda), None)
    ranks = Ranks.of(distributed, process_group, on_gpu if device is None else torch.device(device))
    with own_precision(), ranks.together(), _opened(journal, snapshot_every, ranks) as opened:
        check_gatherable(model, ranks.members)
        job = Job.of(ModelWeights(model), config, filter_fn, device, max_memory, progress, ranks)
        job = dataclasses.replace(job, journal=opened)
        if shard_in(model) is not None:
            job = dataclasses.replace(job, weights=ShardedWeights(job, managed))
            if any(ranks.tell(opened is not None)):  # what the journal asks for takes all ranks
                job = dataclasses.replace(job, source=facts_of_values(job.weights))
        report = quantize_weights(job, origin_of(model), quality)
    behind = left_behind(parameters, model)
    if behind is None:
        return report
    if ranks.first:
        warnings.warn(behind, TrainingWarning, stacklevel=2)
    return dataclasses.replace(report, warnings=(*report.warnings, behind))


def _opened(
    journal: str | Path | Journal | None, snapshot_every: int, ranks: Ranks
) -> contextlib.AbstractContextManager[Journal | None]:
    if journal is None and snapshot_every:
        raise ConfigError(
            f"snapshot_every={snapshot_every!r} is about a journal, and there is none: give journal=DIRECTORY"
        )
    if not ranks.first:
        return contextlib.nullcontext()
    if journal is None or isinstance(journal, Journal):
        return contextlib.nullcontext(journal)
    how = f"quantize_(…, journal={str(journal)!r}) of the original model"
    return Journal(Path(journal), resume=True, required=True, how=how, snapshot_every=snapshot_every)


def quantize_weights(job: Job, origin: Origin | None = None, quality: QualityCheck | None = None) -> Report:
    """`quantize_` for a model whose weights are anywhere.

    Args:
        origin: where the model came from; None: from nowhere, or it does not matter.
        quality: see `quantize_`.

    Raises:
        StrictError: with `strict`, the model is only a part of what is stored there.
    """
    if origin is not None and origin.lost and job.config.strict:
        raise StrictError(f"strict=True, and {origin.loss(job.model)}")
    if job.config.target_bits is not None:
        check_possible(job)
    apart = ranks_apart(job)
    if apart is not None:
        warnings.warn(apart, TrainingWarning, stacklevel=3)
    check_agreement(job)
    recipe = _recipe(job.config, job.batches)  # before anything can change the data
    # The model may draw random numbers when it runs.
    draws = torch.random.fork_rng([job.device] if job.device.type == "cuda" else [])
    with draws, _judged(job, quality) as judge:
        if isinstance(job.weights, ModelWeights):
            weights = job.weights if isinstance(job.weights, RestorableWeights) else RestorableWeights(job)
            with weights.restored_on_error():
                # Whether all have come to the end is known within, while the model can still be put back.
                report = judge(with_all_ranks(_quantize(dataclasses.replace(job, weights=weights)), job.ranks))
        else:
            report = judge(with_all_ranks(_quantize(job), job.ranks))
    told = report.warnings if apart is None else (apart, *report.warnings)
    report = requantized(dataclasses.replace(report, recipe=recipe, warnings=told), job.model)
    if origin is None:
        return report
    notes = (*report.notes, *origin.notes(job.model))
    return dataclasses.replace(report, notes=notes, ignored=tuple(origin.ignored), lost=origin.lost)


@contextlib.contextmanager
def _judged(job: Job, check: QualityCheck | None) -> Iterator[Callable[[Report], Report]]:
    """What adds to a report how far the quantized model is from the original, which has predicted by then."""
    if check is None:
        yield lambda report: report
        return
    if job.ranks.size > 1 or isinstance(job.weights, ShardedWeights):
        raise ConfigError(
            "quality is checked in one process that has the whole model: leave the check out here, and compare the "
            "saved model with the original (gptq-ao eval --reference, or gptq_ao.evaluate)"
        )
    free = free_bytes(torch.device("cpu"))
    allowed = [n for n in (job.limits.host, None if free is None else free // 4) if n is not None]
    with contextlib.ExitStack() as until_done:
        with job.clock("quality"):
            waits = compared(check, job.weights, job.device, min(allowed, default=None))
            compare = until_done.enter_context(waits)

        def judge(report: Report) -> Report:
            with job.clock("quality"):
                found = compare()
            return dataclasses.replace(report, quality=found, measured={**report.measured, **found.measured})

        yield judge


def _recipe(config: GPTQConfig, batches: list[Batch] | None) -> dict[str, str]:
    """What was asked for, in a few words."""
    bits = f"{config.bits} bits" if config.target_bits is None else f"{config.target_bits} bits on average"
    grid = "symmetric" if config.sym else "asymmetric"
    method = f"GPTQ, act_order {config.act_order}" if config.method == "gptq" else "rounded to nearest"
    size = "by width" if config.group_size is None else config.group_size
    settings = f"{bits}, group_size {size}, {grid}, {method}"
    rules = {"rules": str(config.rules)} if config.rules else {}
    if batches is None:
        return {"recipe": settings, **rules, "calibration": "none"}
    # Of `gptq_ao.data`, which knows what it has read.
    described = getattr(config.calibration, "described", None)
    data = {} if described is None else {"calibration data": described}
    return {"recipe": settings, **rules, "calibration": f"{len(batches)} batches, sha256 {digest(batches)}", **data}


def _quantize(job: Job) -> Report:
    try:
        prepared = prepare(job)
    except CaptureError as e:
        if job.config.strict_capture or not isinstance(job.weights, RestorableWeights):
            raise
        if job.ranks.size > 1:
            raise ConfigError(
                "the model cannot be captured as one graph, and only a graph can be quantized on several ranks: "
                f"quantize on one of them, save_quantized, and load that on all; or change the model. {e}"
            ) from e
        if job.config.target_bits is not None:
            raise ConfigError(
                "target_bits needs gradients of the model as one graph, and it cannot be captured as one: give bits "
                f"instead, with rules for single weights, or change the model. {e}"
            ) from e
        if job.limits != Limits():
            raise ConfigError(
                "max_memory cannot be kept, since the model cannot be captured as one graph: all batches would wait in "
                f"the middle of a forward. {e}"
            ) from e
        if job.journal is not None and job.journal.required:
            raise ConfigError(
                "nothing could be kept of this run to go on with, since the model cannot be captured as one graph, and "
                f"all of its forwards are under way until the end: leave out journal, resume and snapshots. {e}"
            ) from e
        return _replay(job, job.weights, str(e))
    with job.clock("plan"):
        begin(job, prepared)
        _check(job, prepared.selection)
    decisions: tuple[Decision, ...] = decided(job) or ()
    if job.config.target_bits is not None:
        with job.clock("precision"):
            if not decisions:
                decisions = choose_precision(job, prepared)
                write_decisions(job, decisions)
            prepared = with_precision(job, prepared, decisions)
    if job.ranks.first:
        prepared.warn(deeper=1)
    if prepared.calibrated is None:
        done, waiting, divided = round_all(job, prepared.selection), None, None
    else:
        with job.clock("plan"):
            allotted, plan = allot(job, prepared), prepared.calibrated.plan
            if allotted.left is not None and isinstance(job.weights, RestorableWeights):
                job.weights.keep_at_most(allotted.left, job.device)
            batches = waiting_batches(job, plan) or job.ranks.share(prepared.calibrated.batches)
        with ActivationStore(batches, job.device, allotted.budget) as store:
            done = run_plan(job, prepared.calibrated, store, allotted.portions)
            waiting = store.peak
        divided = note_of(plan, allotted.portions)
    report = _report(job, done, prepared, waiting)
    notes = report.notes if divided is None else (*report.notes, divided)
    return dataclasses.replace(report, precision=decisions, notes=notes)


def _replay(job: Job, weights: RestorableWeights, reason: str) -> Report:
    """Without a graph, for `reason`."""
    if job.device != weights.device:
        raise ConfigError(
            f"the model cannot be captured as one graph, so it has to run as a whole, on {job.device}: move it there "
            f"first, model.to({str(job.device)!r}). {reason}"
        )
    if job.config.calibrate_all_experts:
        raise ConfigError(
            "calibrate_all_experts needs the model as one graph, and it cannot be captured as one: leave the setting "
            f"out, or change the model. {reason}"
        )
    offloaded = next((n for n, p in job.model.named_parameters() if p.device.type == "meta"), None)
    if offloaded is not None:
        raise ConfigError(
            f"the model cannot be captured as one graph, so it has to run as a whole, and {offloaded!r} is offloaded "
            f"or not loaded (it is on meta): load the model without offloading. {reason}"
        )
    with job.clock("plan"):
        weights.make_dense()
        try:
            sites, excluded = find_products(job)
        except CaptureError as e:
            raise CaptureError(f"{reason}\nNor can it run without a graph: {e}") from e
        selection = select(job, sites, excluded)
        check_support(job.config, selection)
        _check(job, selection)
    prepared = Prepared(selection, job.device, mixed_sets(sites, selection, job.model), None)
    prepared.warn(deeper=2)
    if all(c.method == "rtn" for c in selection.settings.values()):
        report = _report(job, round_all(job, selection), prepared)
        return dataclasses.replace(report, capture="replay", capture_reason=reason)
    done = replay(job, weights, selection)
    return dataclasses.replace(
        _report(job, list(done.weights), prepared),
        stages=done.hessians,
        hessians=done.hessians,
        capture="replay",
        capture_reason=reason,
        notes=(*done.notes, *_notes(job, prepared)),
    )


def _check(job: Job, selection: Selection) -> None:
    if isinstance(job.weights, ShardedWeights):
        job.weights.check_cuts(selection)
    job.weights.check(selection.settings, lambda: result_size(job.model, selection))
    if job.journal is not None:
        settings = selection.settings
        kept = sum(layout.packed(settings[n].recipe).nbytes for n, layout in selection.layouts.items())
        job.journal.check_space(kept + (result_size(job.model, selection) if job.journal.ours else 0))


def _notes(job: Job, prepared: Prepared) -> tuple[str, ...]:
    selection = prepared.selection
    widths = {name: layout.in_features for name, layout in selection.layouts.items()}
    notes = (
        _uncompensated(prepared),
        smaller_groups(widths, selection.settings, job.config),
        without_adapters(selection, job.config, job.model),
    )
    return tuple(note for note in notes if note is not None)


def _uncompensated(prepared: Prepared) -> str | None:
    """Which weights are not compensated although they should be."""
    wanted = [n for n, c in prepared.selection.settings.items() if c.recipe.compensates]
    if prepared.calibrated is not None:
        names = uncompensated(prepared.calibrated.plan)
        why = "the original model may send other rows to them"
    else:
        names, why = tuple(wanted), "that needs the model as one graph"
    if not names:
        return None
    return f"not compensated for what was quantized before them, since {why}: {names_of(names)}"


def _report(job: Job, done: list[WeightReport], prepared: Prepared, waiting: Mapping[str, int] | None = None) -> Report:
    stages = prepared.calibrated.plan.stages if prepared.calibrated else ()
    peak = peak_bytes()
    if waiting is not None:
        peak |= {"activations": waiting["device"], "offloaded": waiting["host"], "files": waiting["disk"]}
    return Report(
        weights=tuple(done),
        excluded={e.weight: e.reason for e in prepared.selection.excluded},
        stages=len(stages),
        hessians=sum(len(s.inputs) for s in stages),
        seconds=job.clock.seconds,
        peak_bytes=peak,
        warnings=(
            *prepared.warnings,
            *advice_on_text(job.batches or (), getattr(job.model, "config", None)),
            *advice_on_rows(done, {name: layout.in_features for name, layout in prepared.selection.layouts.items()}),
        ),
        capture="export" if "capture" in job.clock.seconds else "none",
        notes=(*_notes(job, prepared), *notes_of_journal(job)),
    )
