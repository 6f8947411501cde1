"""Registration with torchao: `torchao.quantization.quantize_` and config (de)serialization know `GPTQConfig`.

torchao calls a handler per module. With `filter_fn=gptq_ao.whole_model` that module is the model, and GPTQ runs.
Called for a single layer without calibration data (loaders, adapter merges, `FqnToConfig`), it rounds to nearest.
"""

import dataclasses

import torch
from torch import nn
from torchao.core.config import ALLOWED_AO_MODULES
from torchao.quantization.transform_module import register_quantize_module_handler

from gptq_ao.config import GPTQConfig
from gptq_ao.errors import ConfigError
from gptq_ao.model.ambient import own_precision
from gptq_ao.model.inspection import check_unquantized
from gptq_ao.model.sharded import check_whole
from gptq_ao.model.weights import ModelWeights
from gptq_ao.passes.products.group_sizes import check_group_sizes, largest_fitting
from gptq_ao.passes.records import Layout
from gptq_ao.pipeline.quantize import quantize_
from gptq_ao.pipeline.run_plan import rewrite
from gptq_ao.pipeline.solve_together import round_matrix
from gptq_ao.tensor import GroupTensor

__all__ = ["quantize_parameter_", "register"]


def register() -> None:
    """Make the config known. Importing gptq_ao does this."""
    ALLOWED_AO_MODULES.add("gptq_ao")  # where torchao looks for the class of a serialized config
    register_quantize_module_handler(GPTQConfig)(_quantize_module)


def _quantize_module(module: nn.Module, config: GPTQConfig, *, parameter_name: str = "weight") -> nn.Module:
    config.check_no_adapter("torchao.quantization.quantize_")
    if config.calibration is None:
        quantize_parameter_(module, parameter_name, config)
    # Without a filter torchao hands over each Linear by itself. Rounding it silently would not be what was asked for.
    elif isinstance(module, nn.Linear):
        raise ConfigError(
            "torchao handed over a single Linear, but GPTQ has to see the whole model: call "
            "torchao.quantization.quantize_(model, config, filter_fn=gptq_ao.whole_model), or gptq_ao.quantize_"
        )
    else:
        quantize_(module, config)
    return module


@torch.no_grad()
@own_precision()
def quantize_parameter_(module: nn.Module, name: str, config: GPTQConfig) -> None:
    """Round one parameter of `module` to nearest. Does nothing to one that is quantized already."""
    check_whole(module)
    if name not in module._parameters:
        raise ConfigError(
            f"{name!r} of a {type(module).__name__} is no parameter but computed from others, by a parametrization or "
            "FSDP: make it one (torch.nn.utils.parametrize.remove_parametrizations), or quantize before wrapping"
        )
    parameter = module.get_parameter(name)
    if isinstance(parameter, GroupTensor):
        return
    if config.target_bits is not None:
        raise ConfigError(
            f"target_bits chooses the bits of all of a model's weights with calibration data, not those of {name!r} "
            "alone: give bits"
        )
    config.check_no_adapter("rounding one parameter to nearest")
    check_unquantized(module, lambda each: each == name)
    if parameter.dim() < 2:
        raise ConfigError(f"parameter {name!r} has shape {tuple(parameter.shape)}: only matrices can be quantized")
    stack, out, width = parameter.shape[:-2].numel(), *parameter.shape[-2:]
    check_group_sizes({name: width}, {name: config})
    if config.group_size is None:
        config = dataclasses.replace(config, group_size=largest_fitting([width]))
    layout = Layout(tuple(parameter.shape), stack, out, width, transposed=False)
    rewrite(ModelWeights(module), layout, round_matrix(name, layout.matrix(parameter), config), config, stage=0)
