"""What `import gptq_ao` offers, and what it makes other libraries know."""

import typing as _typing
from importlib import import_module as _import

from gptq_ao import data, errors
from gptq_ao.checkpoint.load import load_quantized
from gptq_ao.checkpoint.save import save_quantized
from gptq_ao.config import GPTQConfig, gptq_config
from gptq_ao.inference.fuse import Fusion, fuse_projections_, unfuse_projections_
from gptq_ao.inference.tune import tune
from gptq_ao.integrations.torchao import register as _register_with_torchao
from gptq_ao.pipeline.quantize import quantize_
from gptq_ao.pipeline.quantize_checkpoint import quantize_checkpoint
from gptq_ao.planning.job import whole_model
from gptq_ao.planning.plan import QuantizationPlan, plan
from gptq_ao.quality.check import QualityCheck
from gptq_ao.report import Report
from gptq_ao.tensor import Int2GroupTensor, Int3GroupTensor, Int4GroupTensor, Int8GroupTensor
from gptq_ao_autoload import watch as _watch
from gptq_ao_autoload import when_imported as _when_imported

if _typing.TYPE_CHECKING:
    from gptq_ao.integrations.transformers import GptqAoConfig

_register_with_torchao()
# transformers takes long to import, and not everyone needs it. Whoever does imports this module of it with any model.
_watch()  # where it is no entry point, or those are turned off
_when_imported("transformers.modeling_utils", lambda: _import("gptq_ao.integrations.transformers"))
_when_imported("peft", lambda: _import("gptq_ao.integrations.peft").register())
_when_imported(
    "torch.distributed.checkpoint.state_dict",
    lambda: _import("gptq_ao.integrations.from_rank0").register_with_torch(),
)
_when_imported(
    "accelerate.utils.fsdp_utils", lambda: _import("gptq_ao.integrations.from_rank0").register_with_accelerate()
)

__all__ = [
    "Fusion",
    "GPTQConfig",
    "GptqAoConfig",
    "Int2GroupTensor",
    "Int3GroupTensor",
    "Int4GroupTensor",
    "Int8GroupTensor",
    "QualityCheck",
    "QuantizationPlan",
    "Report",
    "data",
    "errors",
    "fuse_projections_",
    "gptq_config",
    "load_quantized",
    "plan",
    "quantize_",
    "quantize_checkpoint",
    "save_quantized",
    "tune",
    "unfuse_projections_",
    "whole_model",
]


def __getattr__(name: str) -> _typing.Any:
    if name == "GptqAoConfig":
        return _import("gptq_ao.integrations.transformers").GptqAoConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
