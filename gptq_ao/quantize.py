"""quantize_: the one place that strings the stages together.

batches → capture → canonicalize → find_linears → choose_weights → schedule → observe
        → per stage: calibrate → solve → rewrite
"""

import resource
import sys
from collections.abc import Callable

import torch
from torch import nn
from torchao.core.config import AOBaseConfig

from gptq_ao.activations import ActivationStore
from gptq_ao.batches import read_batches
from gptq_ao.config import GPTQConfig
from gptq_ao.errors import ConfigError
from gptq_ao.passes.canonicalize import canonicalize
from gptq_ao.passes.capture import capture
from gptq_ao.passes.choose_weights import check_group_sizes, choose_weights
from gptq_ao.passes.find_linears import find_linears
from gptq_ao.passes.observe import observe
from gptq_ao.passes.reach_all_experts import reach_all_experts
from gptq_ao.passes.records import Layout, Plan, Selection
from gptq_ao.passes.schedule import schedule
from gptq_ao.preflight import check_unquantized, linear_modules, name_filter, output_heads
from gptq_ao.report import Clock, Report, WeightReport
from gptq_ao.run import rewrite, round_all, run_plan
from gptq_ao.solve_group import round_matrix
from gptq_ao.tensor import GroupTensor
from gptq_ao.weights import ModelWeights, Weights

__all__ = ["quantize_", "quantize_parameter_", "quantize_weights", "whole_model"]

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
    return quantize_weights(ModelWeights(model), config, filter_fn, device)


def quantize_weights(
    weights: Weights,
    config: GPTQConfig,
    filter_fn: FilterFn | None = None,
    device: torch.device | str | None = None,
) -> Report:
    """`quantize_` for a model whose weights are anywhere."""
    clock, model = Clock(), weights.model
    wanted = (lambda name: True) if filter_fn in (None, whole_model) else name_filter(model, filter_fn)
    if config.method == "rtn" and config.calibration is None:
        with clock("plan"):
            selection = choose_weights(*linear_modules(model), config, wanted)
            weights.check(selection)
        return _report(round_all(weights, selection, clock), selection, None, clock)

    batches = read_batches(config.calibration)
    run_on = torch.device(device) if device is not None else weights.device
    with clock("capture"):
        program = canonicalize(capture(model, batches[0], weights.device, batches[1:]), run_on)
    with clock("plan"):
        sites, excluded = find_linears(program, output_heads(model))
        if config.calibrate_all_experts:
            program, sites = reach_all_experts(program, sites)
        selection = choose_weights(sites, excluded, config, wanted)
        weights.check(selection)
        _check_support(config, selection)
        plan = observe(schedule(program, selection))
        bound = [program.bind(batch, f"calibration batch {i}") for i, batch in enumerate(batches)]
    if all(c.method == "rtn" for c in selection.settings.values()):
        return _report(round_all(weights, selection, clock), selection, None, clock)
    with ActivationStore(bound, run_on) as store:
        done = run_plan(weights, program, plan, store, run_on, config, clock)
    return _report(done, selection, plan, clock)


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
    rewrite(ModelWeights(module), layout, round_matrix(name, layout.matrix(parameter), config), {name: config}, stage=0)


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
