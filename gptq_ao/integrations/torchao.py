"""Registration with torchao: `torchao.quantization.quantize_` and config (de)serialization know `GPTQConfig`.

torchao calls a handler per module. With `filter_fn=gptq_ao.whole_model` that module is the model, and GPTQ runs.
Called for a single layer without calibration data (loaders, adapter merges, `FqnToConfig`), it rounds to nearest.
"""

from torch import nn
from torchao.core.config import ALLOWED_AO_MODULES
from torchao.quantization.transform_module import register_quantize_module_handler

from gptq_ao.config import GPTQConfig
from gptq_ao.errors import ConfigError
from gptq_ao.pipeline.quantize import quantize_, quantize_parameter_

__all__ = ["register"]


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
