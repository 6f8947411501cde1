"""plan: what `quantize_` would do, and what it would take, without doing it."""

import dataclasses
import math
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from shutil import disk_usage
from typing import Any

import torch
from torch import nn

from gptq_ao.calibration.activation_store import Budget
from gptq_ao.codes.packed_spec import PackedSpec
from gptq_ao.config import GPTQConfig
from gptq_ao.distributed.ranks import Ranks
from gptq_ao.errors import CaptureError, ConfigError
from gptq_ao.kernels.ops import kernel_name
from gptq_ao.model.ambient import own_precision
from gptq_ao.model.unwrap import same_forward
from gptq_ao.model.weights import ModelWeights, Weights
from gptq_ao.passes.records import HEAD, Excluded, Layout, SharedInput
from gptq_ao.planning.footprint import Footprint
from gptq_ao.planning.job import FilterFn, Job
from gptq_ao.planning.limits import MaxMemory
from gptq_ao.planning.memory import choose_budget, free_bytes, model_bytes, readable, room_of
from gptq_ao.planning.output_bytes import result_size
from gptq_ao.planning.portions import note_of
from gptq_ao.planning.prepare import Prepared, prepare
from gptq_ao.planning.simulate import fakes_on, simulate
from gptq_ao.planning.speed import measure_speed
from gptq_ao.report import names_of

__all__ = ["PlannedWeight", "QuantizationPlan", "StreamedWeights", "plan", "plan_weights"]


HEAD_SHARE = 0.1  # of the result, from which on a dense output head is worth a word


@dataclass(frozen=True)
class PlannedWeight:
    """One weight to be quantized.

    Attributes:
        stage: in which it is solved; 0 without calibration.
        rows: of calibration data, for its Hessian; for one expert on average.
        kernel: what will compute with it on the device.
        bytes: of the quantized weight in memory.
        fallback: why it will be rounded to nearest, wholly or in part, or solved with other data; None: it will not,
            as far as can be known without the data.
    """

    name: str
    shape: tuple[int, ...]
    bits: int
    group_size: int
    method: str
    stage: int
    rows: int
    kernel: str
    bytes: int
    original_bytes: int
    fallback: str | None


@dataclass(frozen=True)
class QuantizationPlan:
    """The result of `plan`. `str(plan)` is a table, `to_dict()` is for JSON.

    Attributes:
        weights: in the order in which they will be solved.
        excluded: name → reason, for every matrix that stays as it is.
        peak_bytes: predicted, of tensors: "device" that computes, "host", and "disk" for activations that fit in
            neither. Libraries' workspaces and the interpreter come on top.
        activation_bytes: of all calibration batches that wait between two segments, when they are most.
        output_bytes: of the tensors in a saved checkpoint, exactly.
        seconds: phase → time; that of "capture" and "plan" is measured, of "calibrate" and "solve" estimated from a
            short measurement of the device, and missing where that is not there.
        warnings: what may be a problem for whoever uses the result.
        notes: what memory makes slower than it could be, and an output head that is much of the result.
    """

    device: str
    weights: tuple[PlannedWeight, ...]
    excluded: Mapping[str, str]
    stages: int
    hessians: int
    peak_bytes: Mapping[str, int]
    activation_bytes: int
    output_bytes: int
    seconds: Mapping[str, float]
    warnings: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per quantized weight, scales, zero points and padding included."""
        return 8 * sum(w.bytes for w in self.weights) / sum(math.prod(w.shape) for w in self.weights)

    def to_dict(self) -> dict[str, Any]:
        """What `gptq-ao plan --json` prints."""
        facts = asdict(self)
        layers = list(facts.pop("weights"))
        facts |= {"weights": len(layers), "bits_per_weight": self.bits_per_weight, "layers": layers}
        return {**facts, "warnings": list(self.warnings), "notes": list(self.notes)}

    def __str__(self) -> str:
        width = max(len(w.name) for w in self.weights)
        lines = [f"{'weight':{width}}  {'shape':>14}  bits  group  method  stage     rows"]
        for w in self.weights:
            shape = "x".join(map(str, w.shape))
            lines.append(
                f"{w.name:{width}}  {shape:>14}  {w.bits:>4}  {w.group_size:>5}  {w.method:>6}  {w.stage:>5}  "
                f"{w.rows:>7}" + (f"  fallback: {w.fallback}" if w.fallback else "")
            )
        lines += [f"left as it is: {name} ({reason})" for name, reason in self.excluded.items()]
        lines += [
            f"{count} weights run as: {kernel}" for kernel, count in Counter(w.kernel for w in self.weights).items()
        ]
        lines.append(
            f"{len(self.weights)} weights, {self.bits_per_weight:.3f} bits each, in {self.stages} stages with "
            f"{self.hessians} Hessians; the result takes {readable(self.output_bytes)}"
        )
        peaks = ", ".join(f"{place} {readable(size)}" for place, size in self.peak_bytes.items())
        lines.append(f"peak memory on {self.device}: {peaks}; of it waiting: {readable(self.activation_bytes)}")
        lines.append(", ".join(f"{phase} {s:.1f} s" for phase, s in self.seconds.items()) + " (an estimate)")
        lines += [f"warning: {text}" for text in self.warnings]
        lines += [f"note: {text}" for text in self.notes]
        return "\n".join(lines)


class StreamedWeights(ModelWeights):
    """For `plan_weights`: a model whose weights `quantize_checkpoint` will read from files, and write to files."""

    def home(self, name: str, *, quantized: bool = False) -> torch.device | None:  # type: ignore[override]
        is_weight = quantized or name in dict(self.model.named_parameters(remove_duplicate=False))
        return None if is_weight else super().home(name)


def plan(
    model: nn.Module,
    config: GPTQConfig,
    filter_fn: FilterFn | None = None,
    device: torch.device | str | None = None,
    max_memory: MaxMemory | None = None,
    processes: int = 1,
) -> QuantizationPlan:
    """What `quantize_` would do with the same arguments, and what it would take.

    No weight is read and nothing is computed: the model may be on the meta device, and so may the calibration batches,
    of which shapes and dtypes matter. The device need not be there.

    Args:
        processes: on one machine, that quantize together (`distributed=True`); said is what each of them takes.

    Raises:
        CalibrationError, NoLinearError: as `quantize_`.
        CaptureError: the model cannot be captured as one graph.
        ConfigError: as `quantize_`; or it would take more memory or disk than there is; or with `target_bits`, whose
            choice takes the values of weights and data.
    """
    if not isinstance(config, GPTQConfig):
        raise ConfigError(f"plan takes a config of gptq_config(), got {type(config).__name__}")
    model = same_forward(model)
    with own_precision():
        return plan_weights(ModelWeights(model), config, filter_fn, device, max_memory, processes=processes)


def plan_weights(
    weights: Weights,
    config: GPTQConfig,
    filter_fn: FilterFn | None = None,
    device: torch.device | str | None = None,
    max_memory: MaxMemory | None = None,
    shard_bytes: int = 0,
    processes: int = 1,
) -> QuantizationPlan:
    """`plan` for a model whose weights are anywhere. `shard_bytes`: of the result that are held in memory besides."""
    if config.target_bits is not None:
        raise ConfigError(
            "target_bits chooses the bits by measuring the model, and a plan reads no weight: plan with bits instead, "
            "in which quantizing takes about as much"
        )
    # The first rank has the most batches.
    ranks = Ranks(size=processes, here=processes)
    job = Job.of(weights, config, filter_fn, device, max_memory, ranks=ranks)
    try:
        prepared = prepare(dataclasses.replace(job, device=fakes_on(job.device)))
    except CaptureError as e:
        if not config.strict_capture:
            e.add_note("quantize_ would replay the model's own forwards. What that takes cannot be planned.")
        raise
    prepared.warn()
    with job.clock("plan"):
        if prepared.calibrated is None:  # rounding to nearest computes where the weights are
            job = dataclasses.replace(job, device=prepared.device)
        footprint = simulate(weights, prepared, job.device, ranks, room_of(job))
        peak = _peak(job, prepared, footprint)
        peak["host"] += shard_bytes
        _check_room(weights, peak, job.device, processes)
        planned = _weights(job, prepared, footprint)
    stages = prepared.calibrated.plan.stages if prepared.calibrated else ()
    divided = note_of(prepared.calibrated.plan, footprint.portions) if prepared.calibrated else None
    size, excluded = result_size(weights.model, prepared.selection), prepared.selection.excluded
    head = _heads_left(weights.model, excluded, size)
    return QuantizationPlan(
        device=str(job.device),
        weights=planned,
        excluded={e.weight: e.reason for e in excluded},
        stages=len(stages),
        hessians=sum(len(s.inputs) for s in stages),
        peak_bytes=peak,
        activation_bytes=footprint.activations,
        output_bytes=size,
        seconds={**job.clock.seconds, **_seconds(footprint, job.device)},
        warnings=prepared.warnings,
        notes=tuple(note for note in (divided, head) if note is not None),
    )


def _heads_left(model: nn.Module, excluded: Sequence[Excluded], size: int) -> str | None:
    """What to say of output heads that are left as they are, and are more than HEAD_SHARE of the result's `size`."""
    heads = [e.weight for e in excluded if e.reason == HEAD]
    own = sum(model.get_parameter(name).nbytes for name in heads)
    if own < HEAD_SHARE * size or not heads:
        return None
    rules = ", ".join(f'"{name.removesuffix(".weight")}": {{"bits": 8}}' for name in heads)
    return (
        f"{names_of(heads)} (output head) stays as it is: {readable(own)} of the result, which every step of decoding "
        f"reads. rules={{{rules}}} quantizes it, too"
    )


def _peak(job: Job, prepared: Prepared, footprint: Footprint) -> dict[str, int]:
    """Where the predicted bytes will be."""
    limits, device = job.limits, job.device
    waiting, originals = footprint.activations, footprint.originals
    # On a CPU the device is the host: what waits can only go to files, and originals are in `footprint.peak`.
    if device.type == "cpu":
        on_disk = 0 if limits.host is None else max(0, waiting - limits.host)
        peak = min(footprint.peak, footprint.working + waiting - on_disk)
        return {"device": peak, "host": peak, "disk": on_disk}
    budget = choose_budget(limits, footprint, device, job.ranks.here) if prepared.calibrated else Budget()
    on_device = waiting if budget.device is None else min(waiting, budget.device)
    offloaded = waiting - on_device
    on_disk = 0 if budget.host is None else max(0, offloaded - budget.host)
    batches = prepared.calibrated.batches if prepared.calibrated else ()
    host = sum(t.nbytes for batch in batches for t in batch.values()) + model_bytes(job.weights, torch.device("cpu"))
    return {
        "device": min(footprint.peak, footprint.working + on_device),
        "host": host + originals + offloaded - on_disk,
        "disk": on_disk,
    }


def _check_room(weights: Weights, peak: Mapping[str, int], device: torch.device, processes: int) -> None:
    places = {"host": torch.device("cpu")} if device.type == "cpu" else {"device": device, "host": torch.device("cpu")}
    for place, where in places.items():
        free, already = free_bytes(where), model_bytes(weights, where, allocated=True)
        # They share the host's memory.
        if free is not None and (peak[place] - already) * (processes if where.type == "cpu" else 1) > free:
            advice = "use a smaller batch size or shorter sequences"
            if place == "host":
                advice = (
                    "stream the checkpoint (--stream, or quantize_checkpoint), which never holds the model; let "
                    "activations wait in files (max_memory={'cpu': …}); use fewer samples or a smaller batch size"
                )
            raise ConfigError(
                f"this would take {readable(peak[place])} of memory on {where}"
                f"{f' for each of {processes} processes' if processes > 1 else ''}, of which {readable(already)} are "
                f"taken already, and {readable(free)} are free: {advice}"
            )
    folder = Path(tempfile.gettempdir())
    if peak["disk"] > disk_usage(folder).free:
        raise ConfigError(
            f"{readable(peak['disk'])} of activations would wait in files in {folder}, which has "
            f"{readable(disk_usage(folder).free)} free: set TMPDIR to a larger disk, allow more memory, or use fewer "
            "samples or shorter sequences"
        )


def _weights(job: Job, prepared: Prepared, footprint: Footprint) -> tuple[PlannedWeight, ...]:
    inputs: dict[str, list[tuple[int, SharedInput]]] = {}
    for number, stage in enumerate(prepared.calibrated.plan.stages if prepared.calibrated else (), 1):
        for shared in stage.inputs:
            for name in shared.weights:
                inputs.setdefault(name, []).append((number, shared))
    order = sorted(prepared.selection.settings, key=lambda name: inputs[name][0][0] if name in inputs else 0)
    planned = []
    for name in order:
        c, layout = prepared.selection.settings[name], prepared.selection.layouts[name]
        parameter, spec = job.model.get_parameter(name), layout.packed(c.recipe)
        of = inputs.get(name, [])
        planned.append(
            PlannedWeight(
                name=name,
                shape=tuple(parameter.shape),
                bits=spec.bits,
                group_size=spec.group_size,
                method=c.method,
                stage=of[0][0] if of else 0,
                rows=sum(footprint.rows[shared.name] for _, shared in of),
                kernel=_kernel(job.device, parameter.dtype, spec, layout),
                bytes=footprint.packed[name],
                original_bytes=parameter.nbytes,
                fallback=_fallback(name, layout, [shared for _, shared in of], footprint, job.config.expert_min_rows)
                if c.method == "gptq"
                else None,
            )
        )
    return tuple(planned)


def _kernel(device: torch.device, dtype: torch.dtype, spec: PackedSpec, layout: Layout) -> str:
    if layout.view_shape is not None:  # no kernel knows the parameter's shape, so its own operator gets a dense weight
        return "dequantize + the dense operator"
    return kernel_name(device, dtype, spec.bits, spec.group_size, spec.shape[-1], spec.stacked)


def _fallback(name: str, layout: Layout, inputs: list[SharedInput], footprint: Footprint, min_rows: int) -> str | None:
    covered = sum(p.stop - p.start for shared in inputs for p in shared.parts if p.weight == name)
    reasons = []
    if covered < layout.rows:
        reasons.append(f"{layout.rows - covered} of {layout.rows} rows: no product of the captured forward uses them")
    few = min((footprint.rows[shared.name] for shared in inputs if shared.experts > 1), default=min_rows)
    if few < min_rows:
        reasons.append(
            f"an expert will see {few} rows on average, and is solved with the Hessian of all experts' rows where it "
            f"sees fewer than {min_rows}"
        )
    return "; ".join(reasons) or None


def _seconds(footprint: Footprint, device: torch.device) -> dict[str, float]:
    if free_bytes(device) is None and device.type != "cpu":
        return {}
    speed = measure_speed(device, footprint.calibrate.flops)
    return {"calibrate": speed.seconds(footprint.calibrate), "solve": speed.seconds(footprint.solve)}
