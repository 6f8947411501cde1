"""quantize_: the one place that strings the stages together.

batches → capture → canonicalize → find_linears → choose_weights → schedule → observe
        → per stage: calibrate → solve → rewrite
"""

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchao.core.config import AOBaseConfig
from torchao.utils import TorchAOBaseTensor
from tqdm import tqdm

from gptq_ao.batches import Batch, read_batches
from gptq_ao.config import GPTQConfig
from gptq_ao.errors import ConfigError, NonFiniteError, SolverError
from gptq_ao.grid import group_columns
from gptq_ao.hessian import Hessian
from gptq_ao.passes.calibrate import calibrate
from gptq_ao.passes.canonicalize import canonicalize
from gptq_ao.passes.capture import capture
from gptq_ao.passes.choose_weights import check_group_sizes, choose_weights
from gptq_ao.passes.find_linears import find_linears
from gptq_ao.passes.observe import observe
from gptq_ao.passes.records import Excluded, HessianGroup, LinearSite, Plan, Program, Selection
from gptq_ao.passes.rewrite import replace_parameter
from gptq_ao.passes.schedule import schedule
from gptq_ao.report import Report, WeightReport
from gptq_ao.solver import Solution, factor, relative_error, round_to_nearest, solve
from gptq_ao.tensor import GroupTensor, tensor_class

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
    _check_not_quantized(model)
    clock = _Clock()
    wanted = _wanted(model, filter_fn)
    if config.method == "rtn" and config.calibration is None:
        with clock("plan"):
            selection = choose_weights(*_linear_modules(model), config, wanted)
            _check_finite(model, selection)
        return _report(_round_all(model, selection, clock), selection, 0, 0, clock, None)

    batches = read_batches(config.calibration)
    run_on = torch.device(device) if device is not None else next(model.parameters()).device
    with clock("capture"):
        program = canonicalize(capture(model, batches[0]), run_on)
    with clock("plan"):
        selection = choose_weights(*find_linears(program, _output_heads(model)), config, wanted)
        _check_finite(model, selection)
        _check_support(config, selection)
        plan = observe(schedule(program, selection))
        store = [_bind(program, batch, i, run_on) for i, batch in enumerate(batches)]
    if all(c.method == "rtn" for c in selection.settings.values()):
        return _report(_round_all(model, selection, clock), selection, 0, 0, clock, run_on)
    weights = _run(model, program, plan, store, run_on, config.strict, clock)
    return _report(weights, selection, len(plan.stages), sum(len(s.groups) for s in plan.stages), clock, run_on)


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
    check_group_sizes({name: ((parameter.shape[-2], parameter.shape[-1]), config)})
    replace_parameter(module, name, _pack(_round(parameter, config), parameter, config, False))


def _run(
    model: nn.Module,
    program: Program,
    plan: Plan,
    store: list[dict[str, Any]],
    device: torch.device,
    strict: bool,
    clock: "_Clock",
) -> list[WeightReport]:
    """All stages in order: observe, solve, rewrite."""

    def static(name: str) -> Any:
        if name in program.constants:
            value = program.constants[name]
        elif name in program.buffers:
            value = model.get_buffer(program.buffers[name])
        else:
            value = model.get_parameter(program.parameters[name]).detach()
        # Dequantized once per segment, not once per batch: it is what the weight's own product does for many rows.
        value = value.dequantize() if isinstance(value, GroupTensor) else value
        return value.to(device) if isinstance(value, Tensor) else value

    transposed = {s.weight: s.transposed for s in plan.selection.sites}
    done: list[WeightReport] = []
    stages = list(zip(plan.stages, plan.segments, strict=True))
    bar = tqdm(enumerate(stages, 1), total=len(stages), unit="stage", disable=None, file=sys.stderr)
    try:
        for number, (stage, segment) in bar:
            bar.set_description(stage.groups[0].weights[0].removesuffix(".weight"))
            with clock("calibrate"):
                hessians = calibrate(segment, stage, store, static)
            with clock("solve"), torch.no_grad():
                for group, hessian in zip(stage.groups, hessians, strict=True):
                    for weight, solution, settings, line in _solve(
                        model, group, hessian, plan.selection, transposed, strict
                    ):
                        parameter = model.get_parameter(weight)
                        packed = _pack(solution, parameter, settings, transposed[weight])
                        replace_parameter(model, weight, packed)
                        done.append(_line(weight, parameter, packed, settings, stage=number, rows=hessian.rows, **line))
    except BaseException as e:
        if done:
            e.add_note(f"{len(done)} of {len(plan.selection.settings)} weights are quantized already: reload the model")
        raise
    return done


def _solve(
    model: nn.Module,
    group: HessianGroup,
    hessian: Hessian,
    selection: Selection,
    transposed: dict[str, bool],
    strict: bool,
) -> Iterator[tuple[str, Solution, GPTQConfig, dict[str, Any]]]:
    """Every weight of a Hessian group: (name, solution, its settings, what the report says of it).

    Weights with the same settings are stacked and solved as one.
    """
    alike: dict[tuple[Any, ...], list[str]] = {}
    for name in group.weights:
        c = selection.settings[name]
        alike.setdefault((c.method, c.act_order, c.damp_percent, c.bits, c.group_size, c.sym), []).append(name)
    blind = "no calibration row reached it" if hessian.matrix.diagonal().count_nonzero() == 0 else None
    for names in alike.values():
        c = selection.settings[names[0]]
        dense = [_matrix(model.get_parameter(n).detach(), transposed[n]).to(hessian.matrix.device) for n in names]
        line: dict[str, Any] = {"method": "rtn", "damp": None, "dead": 0}
        if c.method == "rtn" or blind is not None:
            line["fallback"] = blind if c.method == "gptq" else None
            if strict and line["fallback"]:
                raise SolverError(f"{names[0]}: {blind}, and strict=True forbids rounding to nearest instead")
            solutions = [_round(w, c) for w in dense]
        else:
            try:
                f = factor(hessian, c.act_order, c.damp_percent)
            except SolverError as e:
                raise SolverError(f"{', '.join(names)}: {e}") from e
            line = {"method": "gptq", "damp": f.damp, "dead": f.dead}
            stacked = solve(torch.cat(dense), f, bits=c.bits, group_size=c.group_size, sym=c.sym, act_order=c.act_order)
            solutions = stacked.split([w.shape[0] for w in dense])
        for name, weight, solution in zip(names, dense, solutions, strict=True):
            yield name, solution, c, {**line, "error": relative_error(weight, solution.dequantize(), hessian)}


def _round_all(model: nn.Module, selection: Selection, clock: "_Clock") -> list[WeightReport]:
    lines = []
    transposed = {s.weight: s.transposed for s in selection.sites}
    with clock("solve"), torch.no_grad():
        for name, c in selection.settings.items():
            parameter = model.get_parameter(name)
            packed = _pack(_round(_matrix(parameter, transposed[name]), c), parameter, c, transposed[name])
            replace_parameter(model, name, packed)
            facts = {"method": "rtn", "stage": 0, "rows": 0, "damp": None, "dead": 0, "error": None}
            lines.append(_line(name, parameter, packed, c, **facts))
    return lines


def _round(weight: Tensor, config: GPTQConfig) -> Solution:
    return round_to_nearest(weight.detach(), bits=config.bits, group_size=config.group_size, sym=config.sym)


def _matrix(parameter: Tensor, transposed: bool) -> Tensor:
    """[out_features, in_features], however the parameter is stored."""
    return parameter.mT if transposed else parameter


def _pack(solution: Solution, parameter: Tensor, config: GPTQConfig, transposed: bool) -> GroupTensor:
    parts = (t.to(parameter.device) for t in (solution.codes, solution.scale, solution.zero_point))
    perm = None if solution.perm is None else solution.perm.to(parameter.device)
    return tensor_class(config.bits).from_codes(*parts, dtype=parameter.dtype, perm=perm, transposed=transposed)


def _line(name: str, parameter: Tensor, packed: GroupTensor, config: GPTQConfig, **facts: Any) -> WeightReport:
    inner = [getattr(packed, n) for n in packed.__tensor_flatten__()[0]]
    return WeightReport(
        name=name,
        shape=tuple(parameter.shape),
        bits=config.bits,
        group_size=group_columns(packed.in_features, config.group_size),
        bytes=sum(t.nbytes for t in inner),
        original_bytes=parameter.nbytes,
        **facts,
    )


def _report(
    weights: list[WeightReport],
    selection: Selection,
    stages: int,
    hessians: int,
    clock: "_Clock",
    device: torch.device | None,
) -> Report:
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device is not None and device.type == "cuda":
        peak["cuda"] = torch.cuda.max_memory_allocated(device)
    excluded = {e.weight: e.reason for e in selection.excluded}
    return Report(tuple(weights), excluded, stages, hessians, clock.seconds, peak)


def _bind(program: Program, batch: Batch, index: int, device: torch.device) -> dict[str, Any]:
    return {name: t.to(device) for name, t in program.bind(batch, f"calibration batch {index}").items()}


def _wanted(model: nn.Module, filter_fn: FilterFn | None) -> Callable[[str], bool]:
    """A module filter as a condition on parameter names. A shared parameter is wanted if one of its modules is."""
    if filter_fn is None or filter_fn is whole_model:
        return lambda name: True
    chosen = set()
    for prefix, module in model.named_modules(remove_duplicate=False):
        if filter_fn(module, prefix):
            chosen |= {id(p) for p in module._parameters.values() if p is not None}
    return lambda name: id(model.get_parameter(name)) in chosen


def _output_heads(model: nn.Module) -> frozenset[str]:
    """The output head of a Hugging Face model, by the model's own word."""
    declared = getattr(model, "get_output_embeddings", lambda: None)()
    weight = getattr(declared, "weight", None)
    return frozenset(name for name, p in model.named_parameters(remove_duplicate=False) if p is weight)


def _linear_modules(model: nn.Module) -> tuple[tuple[LinearSite, ...], tuple[Excluded, ...]]:
    """Without data there is no graph: the weights of nn.Linear, in the form in which `find_linears` gives them."""
    heads = _output_heads(model)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    names = {id(p): name for name, p in model.named_parameters()}
    sites: dict[str, LinearSite] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear):
            name = names[id(module.weight)]
            embedded = "also the embedding table" if id(module.weight) in tables else None
            head = "output head" if name in heads or name.endswith("lm_head.weight") else None
            shape = (module.out_features, module.in_features)
            sites[name] = LinearSite(name, name, name, None, shape, False, embedded or head)
    excluded = [
        Excluded(name, "not the weight of an nn.Linear: give a calibration batch to find its products", expected=True)
        for name, p in model.named_parameters()
        if p.dim() >= 2 and name not in sites
    ]
    return tuple(sites.values()), tuple(excluded)


def _check_not_quantized(model: nn.Module) -> None:
    done = [name for name, p in model.named_parameters() if isinstance(p, TorchAOBaseTensor)]
    if done:
        raise ConfigError(
            f"the model is already quantized: {len(done)} of its parameters, such as {done[0]!r}, are "
            f"{type(model.get_parameter(done[0])).__name__}. Start from the original weights"
        )


def _check_finite(model: nn.Module, selection: Selection) -> None:
    for name in selection.settings:
        bad = int((~torch.isfinite(model.get_parameter(name))).sum())
        if bad:
            shape = tuple(model.get_parameter(name).shape)
            raise NonFiniteError(f"{bad} elements of {name!r} {shape} are NaN or infinite: repair the checkpoint first")


def _check_support(config: GPTQConfig, selection: Selection) -> None:
    missed = [e for e in selection.excluded if not e.expected]
    if config.strict and missed:
        listing = "\n".join(f"  {e.weight}: {e.reason}" for e in missed)
        raise ConfigError(
            f"strict=True, and these weights would be left as they are:\n{listing}\nExclude them by a rule "
            "(name: None) to say that this is meant"
        )


class _Clock:
    """Wall time by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
