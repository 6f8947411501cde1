"""quantize_: the one place that strings the stages together.

batches → capture → canonicalize → find_linears → choose_weights → schedule → observe
        → per stage: calibrate → solve → rewrite
"""

import resource
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchao.core.config import AOBaseConfig
from tqdm import tqdm

from gptq_ao.batches import Batch, read_batches
from gptq_ao.config import GPTQConfig
from gptq_ao.errors import ConfigError
from gptq_ao.hessian import Hessian
from gptq_ao.passes.calibrate import calibrate
from gptq_ao.passes.canonicalize import canonicalize
from gptq_ao.passes.capture import capture
from gptq_ao.passes.choose_weights import check_group_sizes, choose_weights
from gptq_ao.passes.find_linears import find_linears
from gptq_ao.passes.observe import observe
from gptq_ao.passes.reach_all_experts import reach_all_experts
from gptq_ao.passes.records import Layout, Plan, Program, Selection, Stage
from gptq_ao.passes.schedule import schedule
from gptq_ao.preflight import check_unquantized, check_values, linear_modules, name_filter, output_heads
from gptq_ao.report import Clock, Report, WeightReport
from gptq_ao.solve_group import SolvedPart, expert_hessians, join_parts, round_matrix, solve_group
from gptq_ao.tensor import GroupTensor, tensor_class
from gptq_ao.weights import ModelWeights

__all__ = ["quantize_", "quantize_parameter_", "whole_model"]

FilterFn = Callable[[nn.Module, str], bool]


def quantize_(
    model: nn.Module,
    config: AOBaseConfig,
    filter_fn: FilterFn | None = None,
    device: torch.device | str | None = None,
) -> Report | None:
    """Quantize the weights of `model`, in place. The modules stay what they are; only parameters are replaced.

    Args:
        config: from `gptq_config`. Any other torchao config is handed to `torchao.quantization.quantize_`.
        filter_fn: `(module, name) -> bool`, which modules' weights to quantize; None: all that config selects.
        device: where to compute, one segment's weights at a time. None: where the model is. Each weight ends up on
            the device it came from.

    Returns:
        What was done, per weight; None for another library's config.

    Raises:
        CalibrationError, CaptureError, ConfigError, NoLinearError, NonFiniteError, SolverError: see each message.
        Unless it says otherwise, the model is as it was.
    """
    if not isinstance(config, GPTQConfig):
        import torchao.quantization

        given = {} if filter_fn is None else {"filter_fn": filter_fn}
        torchao.quantization.quantize_(model, config, device=device, **given)
        return None
    check_unquantized(model)
    clock = Clock()
    weights = ModelWeights(model)
    wanted = (lambda name: True) if filter_fn in (None, whole_model) else name_filter(model, filter_fn)
    if config.method == "rtn" and config.calibration is None:
        with clock("plan"):
            selection = choose_weights(*linear_modules(model), config, wanted)
            check_values((n, weights.get(n)) for n in selection.settings)
        return _report(_round_all(weights, selection, clock), selection, None, clock)

    batches = read_batches(config.calibration)
    run_on = torch.device(device) if device is not None else weights.device
    with clock("capture"):
        program = canonicalize(capture(model, batches[0], weights.device), run_on)
    with clock("plan"):
        sites, excluded = find_linears(program, output_heads(model))
        if config.calibrate_all_experts:
            program, sites = reach_all_experts(program, sites)
        selection = choose_weights(sites, excluded, config, wanted)
        check_values((n, weights.get(n)) for n in selection.settings)
        _check_support(config, selection)
        plan = observe(schedule(program, selection))
        store = [_bind(program, batch, i, run_on) for i, batch in enumerate(batches)]
    if all(c.method == "rtn" for c in selection.settings.values()):
        return _report(_round_all(weights, selection, clock), selection, None, clock)
    return _report(_run(weights, program, plan, store, run_on, config, clock), selection, plan, clock)


def whole_model(module: nn.Module, name: str) -> bool:
    """For `torchao.quantization.quantize_(model, gptq_config(...), filter_fn=gptq_ao.whole_model)`: hand over the model
    as a whole, since GPTQ has to see how its layers are connected."""
    return name == ""


@torch.no_grad()
def quantize_parameter_(module: nn.Module, name: str, config: GPTQConfig) -> None:
    """Round one parameter of `module` to nearest. Does nothing to one that is quantized already."""
    parameter = module.get_parameter(name)
    if isinstance(parameter, GroupTensor):
        return
    if parameter.dim() < 2:
        raise ConfigError(f"parameter {name!r} has shape {tuple(parameter.shape)}: only matrices can be quantized")
    check_group_sizes({name: (tuple(parameter.shape), parameter.shape[-1], config)})
    stack, out, width = parameter.shape[:-2].numel(), *parameter.shape[-2:]
    layout = Layout(tuple(parameter.shape), stack, out, width, transposed=False)
    _rewrite(
        ModelWeights(module), layout, round_matrix(name, layout.matrix(parameter), config), {name: config}, stage=0
    )


def _run(
    weights: ModelWeights,
    program: Program,
    plan: Plan,
    store: list[dict[str, Any]],
    device: torch.device,
    config: GPTQConfig,
    clock: Clock,
) -> list[WeightReport]:
    """All stages in order: observe, solve, rewrite."""
    done: list[WeightReport] = []
    stages = list(zip(plan.stages, plan.segments, strict=True))
    bar = tqdm(stages, unit="stage", disable=None, file=sys.stderr)  # None: only on a terminal
    try:
        for number, (stage, segment) in enumerate(bar, 1):
            bar.set_description(stage.groups[0].weights[0].removesuffix(".weight"))
            with clock("calibrate"):
                hessians = calibrate(segment, stage, store, lambda name: _static(weights, program, name, device))
            with clock("solve"), torch.no_grad():
                for layout, matrix, solved in _solve(weights, plan, stage, hessians, device, config):
                    whole = join_parts(solved, matrix, plan.selection.settings[solved[0].part.weight])
                    done.append(_rewrite(weights, layout, whole, plan.selection.settings, number))
    except BaseException as e:
        if done:
            e.add_note(f"{len(done)} of {len(plan.selection.settings)} weights are quantized already: reload the model")
        raise
    return done


def _solve(
    weights: ModelWeights,
    plan: Plan,
    stage: Stage,
    hessians: tuple[tuple[Hessian, ...], ...],
    device: torch.device,
    config: GPTQConfig,
) -> Iterator[tuple[Layout, Tensor, list[SolvedPart]]]:
    """Each weight of a stage with all its parts, as soon as the last of them is solved."""
    layouts, settings = plan.selection.layouts, plan.selection.settings
    missing = Counter(p.weight for g in stage.groups for p in g.parts for _ in range(g.experts))
    matrices: dict[str, Tensor] = {}
    solved: dict[str, list[SolvedPart]] = {}
    for group, of_group in zip(stage.groups, hessians, strict=True):
        for name in group.weights:
            if name not in matrices:
                matrices[name] = layouts[name].matrix(weights.get(name, device))
        for expert, (hessian, fallback) in enumerate(expert_hessians(of_group, config.expert_min_rows)):
            rows = {p: matrices[p.weight][p.start : p.stop] for p in group.expert(expert)}
            for part in solve_group(rows, settings, hessian, config.strict, fallback):
                name = part.part.weight
                solved.setdefault(name, []).append(part)
                missing[name] -= 1
                if not missing[name]:
                    yield layouts[name], matrices.pop(name), solved.pop(name)


def _round_all(weights: ModelWeights, selection: Selection, clock: Clock) -> list[WeightReport]:
    with clock("solve"), torch.no_grad():
        return [
            _rewrite(
                weights,
                selection.layouts[name],
                round_matrix(name, selection.layouts[name].matrix(weights.get(name)), c),
                selection.settings,
                0,
            )
            for name, c in selection.settings.items()
        ]


def _rewrite(
    weights: ModelWeights, layout: Layout, solved: SolvedPart, settings: Mapping[str, GPTQConfig], stage: int
) -> WeightReport:
    """Put a solution in place of its parameter."""
    name, s = solved.part.weight, solved.solution
    parameter = weights.model.get_parameter(name)
    stacked = layout.stacked and layout.stack > 1
    codes, scale, zero_point = (
        t.unflatten(0, (layout.stack, -1)) if stacked else t for t in (s.codes, s.scale, s.zero_point)
    )
    packed = tensor_class(settings[name].bits).from_codes(
        codes,
        scale,
        zero_point,
        dtype=parameter.dtype,
        perm=s.perm,
        transposed=layout.transposed,
        view_as=layout.view_as,
    )
    weights.replace(name, packed)
    return WeightReport(
        name=name,
        shape=tuple(parameter.shape),
        bits=packed.bits,
        group_size=packed.group_size,
        method=solved.method,
        stage=stage,
        rows=solved.rows,
        damp=solved.damp,
        dead=solved.dead,
        error=None if solved.changed is None else solved.changed / solved.energy if solved.energy else 0.0,
        bytes=sum(getattr(packed, n).nbytes for n in packed.__tensor_flatten__()[0]),
        original_bytes=parameter.nbytes,
        fallback=solved.fallback,
    )


def _static(weights: ModelWeights, program: Program, name: str, device: torch.device) -> Any:
    """A parameter, buffer or constant of the graph, on the device that runs it."""
    if name in program.constants:
        value = program.constants[name]
        return value.to(device) if isinstance(value, Tensor) else value
    value = weights.get(program.buffers.get(name) or program.parameters[name], device)
    # Dequantized once per segment, not once per batch: it is what the weight's own product does for many rows.
    return value.dequantize() if isinstance(value, GroupTensor) else value


def _bind(program: Program, batch: Batch, index: int, device: torch.device) -> dict[str, Any]:
    return {name: t.to(device) for name, t in program.bind(batch, f"calibration batch {index}").items()}


def _check_support(config: GPTQConfig, selection: Selection) -> None:
    missed = [e for e in selection.excluded if not e.expected]
    if config.strict and missed:
        listing = "\n".join(f"  {e.weight}: {e.reason}" for e in missed)
        raise ConfigError(
            f"strict=True, and these weights would be left as they are:\n{listing}\nExclude them by a rule "
            "(name: None) to say that this is meant"
        )


def _report(weights: list[WeightReport], selection: Selection, plan: Plan | None, clock: Clock) -> Report:
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_initialized():
        peak["cuda"] = torch.cuda.max_memory_allocated()
    return Report(
        weights=tuple(weights),
        excluded={e.weight: e.reason for e in selection.excluded},
        stages=len(plan.stages) if plan else 0,
        hessians=sum(len(s.groups) for s in plan.stages) if plan else 0,
        seconds=clock.seconds,
        peak_bytes=peak,
    )
