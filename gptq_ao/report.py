"""What was done to a model: one line per weight, nothing left out."""

import math
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Any

from gptq_ao.adapter import LowRank

__all__ = ["Clock", "Decision", "Quality", "Report", "WeightReport", "names_of"]


def names_of(names: Collection[str]) -> str:
    """Some names for a message: three of them, and how many more."""
    return ", ".join(islice(names, 3)) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@dataclass(frozen=True)
class WeightReport:
    """One quantized weight.

    Attributes:
        method: "gptq" or "rtn".
        stage: the stage it was solved in; 0 without calibration.
        rows: activation rows its Hessian was made of.
        damp: fraction of the Hessian's mean diagonal that was added.
        dead: input features that were zero in all of the data.
        error: relative output error tr(E·H·Eᵀ) / tr(W·H·Wᵀ), with the adapter, if there is one; None without a Hessian.
        bytes: of the quantized weight in memory.
        fallback: why it was rounded to nearest although GPTQ was asked for, or None.
        expert_rows: rows of each expert's own, where the weight is a stack of them.
        adapter: what was solved to be added to it (`adapter_rank`), in host memory; None: nothing.
    """

    name: str
    shape: tuple[int, ...]
    bits: int
    group_size: int
    method: str
    stage: int
    rows: int
    damp: float | None
    dead: int
    error: float | None
    bytes: int
    original_bytes: int
    fallback: str | None = None
    adapter: LowRank | None = None
    expert_rows: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "adapter"}
        return {**values, "adapter_rank": 0 if self.adapter is None else self.adapter.rank}


@dataclass(frozen=True)
class Choice:
    """One candidate of a unit.

    Attributes:
        bits: per weight; 16 leaves the weights as they are.
        size: bytes it takes: codes, scales and zero points, padding included.
        cost: expected harm in nats, finite and ≥ 0. Larger choices may cost more: it is measured, and noisy.
    """

    bits: int
    size: int
    cost: float


@dataclass(frozen=True)
class Unit:
    """Weights that must get the same bits: q/k/v, gate/up, the experts of a layer.

    Attributes:
        names: of the weights. No weight is in two units.
        choices: at least one, in any order.

    Raises:
        ValueError: there is no choice, or one has a negative size or a cost that is negative or not finite.
    """

    names: tuple[str, ...]
    choices: tuple[Choice, ...]

    def __post_init__(self) -> None:
        if not self.choices:
            raise ValueError(f"unit {self.names} has no choices")
        for choice in self.choices:
            # Written so that NaN, for which every comparison is false, is refused.
            if choice.size < 0 or not 0 <= choice.cost < math.inf:
                raise ValueError(f"unit {self.names}: {choice} needs a size >= 0 and a finite cost >= 0")


@dataclass(frozen=True)
class Decision:
    """Automatic precision: what was known of weights that get the same bits, and what they got.

    Attributes:
        unit: with the size and the cost of every candidate: the expected KL divergence, in nats per token (or the
            relative squared error of the outputs, see `passes/expected_harm.py`).
        weights: how many numbers these are.
    """

    unit: Unit
    chosen: Choice
    weights: int

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self.unit), "weights": self.weights, "bits": self.chosen.bits}


@dataclass(frozen=True)
class Quality:
    """A quantized model against its original, on text that it was not calibrated on.

    Attributes:
        kl: KL(original ‖ quantized), in nats per token.
        perplexity, original_perplexity: of both models.
        tokens: how many predictions were compared.
        max_kl, max_perplexity_ratio: the limits that were given, or None.
        text: what the tokens are of.
    """

    kl: float
    perplexity: float
    original_perplexity: float
    tokens: int
    max_kl: float | None = None
    max_perplexity_ratio: float | None = None
    text: str = ""

    @property
    def perplexity_ratio(self) -> float:
        return self.perplexity / self.original_perplexity

    @property
    def missed(self) -> tuple[str, ...]:
        """The limits that are exceeded, in words; of what is no number, every limit is."""
        found = (
            ("KL(original ‖ quantized)", self.kl, self.max_kl),
            ("perplexity divided by the original's", self.perplexity_ratio, self.max_perplexity_ratio),
        )
        return tuple(f"{n} is {x:.5g}, more than {top:g}" for n, x, top in found if top is not None and not x <= top)

    @property
    def measured(self) -> dict[str, float]:
        """For the model card."""
        return {
            "KL(original ‖ quantized), nats per token": self.kl,
            "perplexity": self.perplexity,
            "perplexity of the original": self.original_perplexity,
            "tokens that these are of": self.tokens,
        }

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "perplexity_ratio": self.perplexity_ratio, "missed": list(self.missed)}


@dataclass(frozen=True)
class Report:
    """The result of `quantize_`. `str(report)` is a table, `rich.print(report)` one as wide as the terminal, a notebook
    shows a page, `save` writes that and JSON, `to_dict()` is what is in the JSON.

    Attributes:
        weights: in the order in which they were solved.
        excluded: name → reason, for every matrix of the model that stays as it is.
        hessians: how many were accumulated.
        seconds: phase → wall time: capture, plan, precision, calibrate, solve.
        peak_bytes: so far in this process. "host": resident memory (not known on Windows); "cuda": PyTorch's allocator,
            where CUDA is in use. Of this call, if it was calibrated: the activations that waited on the device
            ("activations"), in host memory besides ("offloaded"), and in files ("files").
        warnings: what may be a problem for whoever uses the result.
        capture: how the model was followed: "export", as one graph; "replay", by running its own forwards; "none",
            without data.
        capture_reason: why it is not one graph, for "replay".
        notes: what was done less well than it could have been, beside the fallbacks.
        ignored: tensors of the checkpoint that the model's class does not use. They are saved as they are.
        lost: tensors of the checkpoint that are not in the model, which is only a part of it. They are not saved.
        precision: with `target_bits`, how the bits were chosen.
        recipe: the settings, and what identifies the calibration data.
        measured: what you found of the quantized model, name → value, for its model card.
        quality: what was measured of it in the same run, if a check was given.
    """

    weights: tuple[WeightReport, ...]
    excluded: Mapping[str, str]
    stages: int
    hessians: int
    seconds: Mapping[str, float]
    peak_bytes: Mapping[str, int]
    warnings: tuple[str, ...] = ()
    capture: str = "export"
    capture_reason: str | None = None
    notes: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    precision: tuple[Decision, ...] = ()
    recipe: Mapping[str, str] = field(default_factory=dict)
    measured: Mapping[str, float] = field(default_factory=dict)
    quality: Quality | None = None

    @property
    def fallbacks(self) -> dict[str, str]:
        return {w.name: w.fallback for w in self.weights if w.fallback is not None}

    @property
    def adapter(self) -> dict[str, LowRank]:
        """Weight → what is to be added to it, see `gptq_ao.training`; empty without `adapter_rank`."""
        return {w.name: w.adapter for w in self.weights if w.adapter is not None}

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per quantized weight, scales, zero points and padding included."""
        return 8 * sum(w.bytes for w in self.weights) / sum(math.prod(w.shape) for w in self.weights)

    @property
    def adapter_bits_per_weight(self) -> float:
        """What the adapter adds to `bits_per_weight`, in the fp32 that it is saved in; 0 without one."""
        return 8 * sum(a.nbytes for a in self.adapter.values()) / sum(math.prod(w.shape) for w in self.weights)

    def to_dict(self) -> dict[str, Any]:
        """What is in the JSON, see docs/report.md."""
        return {
            "weights": len(self.weights),
            "stages": self.stages,
            "hessians": self.hessians,
            "bits_per_weight": self.bits_per_weight,
            "adapter_bits_per_weight": self.adapter_bits_per_weight,
            "bytes": sum(w.bytes for w in self.weights),
            "original_bytes": sum(w.original_bytes for w in self.weights),
            "adapter_bytes": sum(a.nbytes for a in self.adapter.values()),
            "seconds": dict(self.seconds),
            "peak_bytes": dict(self.peak_bytes),
            "layers": [w.to_dict() for w in self.weights],
            "excluded": dict(self.excluded),
            "fallbacks": self.fallbacks,
            "warnings": list(self.warnings),
            "capture": self.capture,
            "capture_reason": self.capture_reason,
            "notes": list(self.notes),
            "ignored": list(self.ignored),
            "lost": list(self.lost),
            "precision": [d.to_dict() for d in self.precision],
            "recipe": dict(self.recipe),
            "measured": dict(self.measured),
            "quality": None if self.quality is None else self.quality.to_dict(),
        }

    def save(self, directory: str | Path, *, model: str = "", plan: Mapping[str, Any] | None = None) -> None:
        """Write `report.json` and `report.html`, one page with all that it needs; see docs/report.md.

        Args:
            directory: is made if it is missing; files of these names in it are replaced.
            model: its name, for the title.
            plan: what was planned (`plan(…).to_dict()`), to be shown beside what was measured.

        Raises:
            CheckpointError: a file cannot be written.
        """
        from gptq_ao.presentation.files import write_report

        write_report(Path(directory), {"model": model, **self.to_dict(), "plan": plan})

    def _repr_html_(self) -> str:
        """For notebooks: the page in a frame of its own, whose styles are not those of the notebook."""
        from gptq_ao.presentation.files import framed

        return framed(self.to_dict())

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from gptq_ao.presentation.terminal import rendering

        return rendering(self.to_dict(), options.max_width)

    def __str__(self) -> str:
        # Columns line up: the longest name decides.
        width = max(len(w.name) for w in self.weights)
        lines = [f"{'weight':{width}}  {'shape':>14}  bits  group  method  stage     rows    damp      error"]
        for w in self.weights:
            shape = "x".join(map(str, w.shape))
            damp = "" if w.damp is None else f"{w.damp:.4f}"
            error = "" if w.error is None else f"{w.error:.2e}"
            lines.append(
                f"{w.name:{width}}  {shape:>14}  {w.bits:>4}  {w.group_size:>5}  {w.method:>6}  {w.stage:>5}  "
                f"{w.rows:>7}  {damp:>6}  {error:>9}" + (f"  fallback: {w.fallback}" if w.fallback else "")
            )
        total, original = sum(w.bytes for w in self.weights), sum(w.original_bytes for w in self.weights)
        lines.append(
            f"{len(self.weights)} weights in {self.stages} stages, {original / 2**20:.1f} → {total / 2**20:.1f} MiB, "
            f"{self.bits_per_weight:.3f} bits per weight"
        )
        if self.adapter:
            size = sum(a.nbytes for a in self.adapter.values())
            ranks = sorted({a.rank for a in self.adapter.values()})
            which = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
            lines.append(
                f"report.adapter: of rank {which} for {len(self.adapter)} weights, {size / 2**20:.1f} MiB in fp32, "
                f"{self.adapter_bits_per_weight:.3f} bits per weight more"
            )
        lines += _table(self.precision)
        lines += [f"left as it is: {name} ({reason})" for name, reason in self.excluded.items()]
        if self.quality is not None:
            lines += [f"{name}: {value:.6g}" for name, value in self.quality.measured.items()]
            lines += [f"quality: {text}" for text in self.quality.missed]
        lines += [f"warning: {text}" for text in self.warnings]
        if self.capture_reason is not None:
            lines.append(f"not captured as one graph, its forwards were replayed: {self.capture_reason}")
        lines += [f"note: {note}" for note in self.notes]
        lines.append(", ".join(f"{phase} {s:.1f} s" for phase, s in self.seconds.items()))
        return "\n".join(lines)


def _table(decisions: tuple[Decision, ...]) -> list[str]:
    """A line for each decision: expected harm by bits, the chosen one marked."""
    if not decisions:
        return []
    # A unit is shown by its first weight, and how many more there are.
    names = [d.unit.names[0] + (f" +{len(d.unit.names) - 1}" if len(d.unit.names) > 1 else "") for d in decisions]
    width, bits = max(map(len, names)), sorted({c.bits for d in decisions for c in d.unit.choices})
    lines = [f"{'expected harm, at bits:':{width}}  {'weights':>10}" + "".join(f"{b:>10} " for b in bits)]
    for name, d in zip(names, decisions, strict=True):
        costs = {c.bits: c.cost for c in d.unit.choices}
        # A candidate that was not considered for a unit leaves its cell (11 characters) empty.
        cells = (f"{costs[b]:>10.2e}{'*' if b == d.chosen.bits else ' '}" if b in costs else " " * 11 for b in bits)
        lines.append(f"{name:{width}}  {d.weights:>10}{''.join(cells)}")
    size, weights = sum(d.chosen.size for d in decisions), sum(d.weights for d in decisions)
    total = sum(d.chosen.cost for d in decisions)
    lines.append(f"* chosen: {8 * size / weights:.4f} bits per weight, expected harm {total:.3g}")
    return lines


class Clock:
    """Wall time by phase: `with clock("solve"): …`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            # Added up: a phase may be entered many times. In `finally`, so that time before an error counts too.
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
