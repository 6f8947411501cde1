"""What takes over when torch.export cannot turn a model into one graph: its own forwards, run in step.

Every calibration batch runs `model(...)` once, in a thread of its own, of which only one is awake at any time. A thread
that is about to multiply an activation by a weight that is not solved yet stops there. When all have stopped or ended,
the weight that comes first is solved on the activations that wait for it, its new values are put in place, and the
threads go on.

So a layer sees inputs made by already quantized layers, as in the graph, each operation runs once per batch, and
control flow may be any Python. (Replaying a model block by block would have to know its blocks, and run each of them
twice.) What it costs: the model stays where it is, and all batches wait in the middle of a forward, with what their
frames hold. A forward before that, without quantization, finds the weights.

A weight that is applied again later is solved at its first use. What the later use, or a batch that came to it too
late, would have added is left out, and the report says so.
"""

import threading
from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from gptq_ao.batches import Batch
from gptq_ao.config import GPTQConfig
from gptq_ao.errors import NonFiniteError, SolverError
from gptq_ao.hessian import Hessian, HessianObserver
from gptq_ao.passes.calibration_mode import calibration_mode
from gptq_ao.passes.eager_products import Parameters, Use, Watch
from gptq_ao.passes.find_linears import ROUTER, left_out_by_name
from gptq_ao.passes.records import Excluded, LinearSite, Part, Rows, Selection
from gptq_ao.report import WeightReport
from gptq_ao.run import rewrite
from gptq_ao.solve_group import SolvedPart, expert_hessians, join_parts, round_matrix, solve_group
from gptq_ao.weights import ModelWeights

__all__ = ["find_products", "run_in_step"]


def find_products(
    model: nn.Module, batches: list[Batch], heads: frozenset[str]
) -> tuple[tuple[LinearSite, ...], tuple[Excluded, ...]]:
    """Sites in the order in which forwards reach them, and all other matrices with the reason: what `find_linears`
    gives of a graph. Runs batches until every matrix was seen in a product, at most all of them."""
    parameters = Parameters(model)
    uses: dict[Part, Use] = {}
    embedded: set[str] = set()
    choosing: set[str] = set()
    problems: dict[str, str] = {}
    with calibration_mode(model):
        for batch in batches:
            if {p.weight for p in uses} >= set(parameters.shapes):
                break
            with Watch(parameters, None, lambda use: _note(uses, use)) as watch:
                model(*batch.args, **batch.kwargs)
            embedded |= watch.embedded
            choosing |= watch.choosing
            problems |= watch.problems
    sites = []
    for part, use in uses.items():
        reason = left_out_by_name(part.weight, embedded, heads)
        reason = reason or (ROUTER if part.weight in choosing else use.note)
        rows = (Rows(f"input of {part.weight}"),)
        sites.append(
            LinearSite(part.weight, part.weight, use.layout, (part.start, part.stop), rows, use.experts, reason)
        )
    found = {s.weight for s in sites}
    excluded = tuple(
        Excluded(n, "embedding table", True)
        if n in embedded
        else Excluded(n, problems.get(n, "no product of the forward uses it"), n not in problems)
        for n in parameters.shapes
        if n not in found
    )
    return tuple(sites), excluded


def run_in_step(
    weights: ModelWeights, batches: list[Batch], selection: Selection, config: GPTQConfig
) -> tuple[list[WeightReport], tuple[str, ...]]:
    """Quantize what was selected.

    Returns:
        What was done per weight, and what is less than a graph would have done.

    Raises:
        NonFiniteError, SolverError: as a run of a plan does. Whatever the model itself raises.
    """
    run = _Run(weights, batches, selection, config)
    try:
        with calibration_mode(weights.model):
            run.solve_all()
    except BaseException as e:
        if run.solved:
            e.add_note(f"{len(run.solved)} weights have new values already: reload the model")
        raise
    finally:
        run.stop()
    return run.finish(), run.notes


class _Stop(BaseException):
    """Ends a thread that waits for a weight nobody will solve."""


class _Forward(threading.Thread):
    """One batch on its way through the model. `step` lets it run to the next unsolved weight, or to its end."""

    def __init__(self, run: "_Run", batch: Batch, settings: Callable[[], ExitStack]) -> None:
        super().__init__(daemon=True)
        self.use: Use | None = None
        self._run, self._batch, self._settings = run, batch, settings
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self.start()

    def step(self) -> None:
        self._go.release()
        self._stopped.acquire()
        if self._error is not None:
            raise self._error

    def run(self) -> None:
        self._go.acquire()
        mask = self._batch.kwargs.get("attention_mask")
        mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        try:
            if not self._run.stopping:
                with self._settings(), Watch(self._run.parameters, mask, self._wait):
                    self._run.model(*self._batch.args, **self._batch.kwargs)
        except _Stop:
            pass
        except BaseException as e:  # handed to the thread that waits in `step`
            self._error = e
        self.use = None
        self._stopped.release()

    def _wait(self, use: Use) -> None:
        if not self._run.wants(use.part):
            return
        self.use = use
        self._stopped.release()
        self._go.acquire()
        if self._run.stopping:
            raise _Stop


class _Run:
    """All forwards, and what they have led to so far."""

    def __init__(self, weights: ModelWeights, batches: list[Batch], selection: Selection, config: GPTQConfig) -> None:
        self.model, self.stopping = weights.model, False
        self.parameters = Parameters(weights.model)
        self.solved: dict[Part, list[SolvedPart]] = {}
        self._weights, self._selection, self._config = weights, selection, config
        self._place = {Part(s.weight, *s.part): i for i, s in enumerate(selection.sites)}
        self._late: dict[str, int] = {}
        # The last Hessians, and the activations they are of: q, k and v are met one after the other.
        self._last: tuple[list[tuple[Tensor, int]], tuple[Hessian, ...]] = ([], ())
        settings = _settings_of_this_thread()
        self._forwards = [_Forward(self, batch, settings) for batch in batches]

    def wants(self, part: Part) -> bool:
        """Whether a product with it has to wait."""
        if part in self.solved:
            self._late[part.weight] = self._late.get(part.weight, 0) + 1
        return part in self._place and part not in self.solved

    def solve_all(self) -> None:
        for forward in self._forwards:
            forward.step()
        while waiting := [f for f in self._forwards if f.use is not None]:
            uses = [f.use for f in waiting if f.use is not None]
            part = min((u.part for u in uses), key=self._place.__getitem__)
            mine = [f for f in waiting if f.use is not None and f.use.part == part]
            self._solve([f.use for f in mine if f.use is not None])
            for forward in mine:
                forward.use = None
                forward.step()

    def stop(self) -> None:
        """End all threads."""
        self.stopping = True
        for forward in self._forwards:
            if forward.is_alive():
                forward._go.release()
                forward.join()

    @torch.no_grad()
    def _solve(self, uses: list[Use]) -> None:
        first = uses[0]
        matrix = self._matrix(first)[first.part.start : first.part.stop]
        n = matrix.shape[0] // first.experts
        done: list[SolvedPart] = []
        for e, (hessian, why) in enumerate(expert_hessians(self._hessians(uses), self._config.expert_min_rows)):
            start = first.part.start + e * n
            rows = {Part(first.part.weight, start, start + n): matrix[e * n : (e + 1) * n]}
            done += solve_group(rows, self._selection.settings, hessian, self._config.strict, why)
        self.solved[first.part] = done
        self._write(first, done)

    def _hessians(self, uses: list[Use]) -> tuple[Hessian, ...]:
        activations = [(u.activation, u.activation._version) for u in uses]
        before, hessians = self._last
        same = len(before) == len(activations) and all(
            a is b and v == w for (a, v), (b, w) in zip(before, activations, strict=True)
        )
        if same:
            return hessians
        observer = HessianObserver(uses[0].layout.in_features, uses[0].experts)
        for use in uses:
            observer(use.rows, use.counts, use.offsets)
            observer.end_batch()
        hessians = observer.finish()
        if hessians[0].first_bad_batch is not None:
            raise NonFiniteError(
                f"the input of {uses[0].part.weight} is NaN or infinite in one of {len(uses)} calibration batches (or "
                "its squares exceed fp32). Check the data, or run the model in bf16 or fp32"
            )
        self._last = (activations, hessians)
        return hessians

    def _matrix(self, use: Use) -> Tensor:
        return use.layout.matrix(self._weights.get(use.part.weight))

    def _write(self, use: Use, done: list[SolvedPart]) -> None:
        """The new values in the memory of the old: views that a forward holds see them too."""
        parameter = self.model.get_parameter(use.part.weight).data
        values = torch.cat([d.solution.dequantize() for d in done]).to(parameter.dtype)
        whole = self._matrix(use).clone()
        whole[use.part.start : use.part.stop] = values
        layout = use.layout
        stack = whole.view(layout.stack, layout.out_features, layout.in_features)
        parameter.copy_((stack.mT if layout.transposed else stack).reshape(parameter.shape))

    @torch.no_grad()
    def finish(self) -> list[WeightReport]:
        """Put quantized tensors in place of the parameters that have their values."""
        by_weight: dict[str, list[SolvedPart]] = {}
        for parts in self.solved.values():
            by_weight.setdefault(parts[0].part.weight, []).extend(parts)
        reports = []
        for number, (name, layout) in enumerate(self._selection.layouts.items(), 1):
            config = self._selection.settings[name]
            matrix = layout.matrix(self._weights.get(name))
            if name in by_weight:
                whole = join_parts(by_weight[name], matrix, config)
            else:
                whole = _unreached(name, matrix, config, self._config.strict)
            reports.append(rewrite(self._weights, layout, whole, self._selection.settings, number))
        return reports

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(
            f"{name} was applied {count} more times after it was solved; those rows are not in its Hessian"
            for name, count in self._late.items()
        )


def _unreached(name: str, matrix: Tensor, config: GPTQConfig, strict: bool) -> SolvedPart:
    why = "no calibration row reached it"
    if strict and config.method == "gptq":
        raise SolverError(f"{name}: {why}, and strict=True forbids rounding to nearest instead")
    solved = round_matrix(name, matrix, config)
    return solved if config.method == "rtn" else SolvedPart(solved.part, solved.solution, "rtn", fallback=why)


def _note(uses: dict[Part, Use], use: Use) -> None:
    """The first use of each part, without keeping activations alive."""
    empty = torch.empty(0)
    uses.setdefault(use.part, Use(use.layout, use.part, use.experts, empty, empty, None, note=use.note))


def _settings_of_this_thread() -> Callable[[], ExitStack]:
    """What a thread does not inherit: no gradients, autocast, the current CUDA device."""
    kinds = [k for k in ("cpu", "cuda") if torch.is_autocast_enabled(k)]
    autocast = {k: torch.get_autocast_dtype(k) for k in kinds}
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def enter() -> ExitStack:
        stack = ExitStack()
        stack.enter_context(torch.no_grad())
        for kind, dtype in autocast.items():
            stack.enter_context(torch.autocast(kind, dtype))
        if device is not None:
            stack.enter_context(torch.cuda.device(device))
            torch.cuda.synchronize()  # makes the device's context that of this thread, which cuBLAS asks for
        return stack

    return enter
