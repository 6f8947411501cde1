"""What vLLM finds by the entry point `vllm.general_plugins`, in each of its processes: a quantization called gptq_ao.

It is that of native checkpoints, and of the other formats with `--quantization gptq_ao`. Files are read by the reader
of this package, and their tensors go through vLLM's own loaders under the names of dense ones, each quantized weight as
one tensor. So vLLM finds their places, and the methods here keep what arrives (`linear.py`, `experts.py`).

What this file needs of vLLM it takes when it is imported: if a version has something else, vLLM says so and goes on.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from gptq_ao.checkpoint.files.find import find_checkpoint
from gptq_ao.checkpoint.formats import format_in
from gptq_ao.errors import CheckpointError
from gptq_ao.integrations.vllm.experts import ExpertsMethod
from gptq_ao.integrations.vllm.files import hub_tensors
from gptq_ao.integrations.vllm.linear import LinearMethod

__all__ = ["GptqAoQuantization", "register"]

NAME = "gptq_ao"
_own_weights = DefaultModelLoader.get_all_weights


class GptqAoQuantization(QuantizationConfig):
    """Says which method a layer has. Which layers are quantized it need not know: each keeps what arrives."""

    @classmethod
    def get_name(cls) -> str:
        return NAME

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0  # where no kernel runs, weights are dequantized for each product

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "GptqAoQuantization":
        return cls()

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Native checkpoints are served so, and the others that can be read where it is asked for."""
        # vLLM has put an empty method where there is none.
        config = {key: value for key, value in hf_quant_cfg.items() if value != ""}
        if user_quant not in (None, NAME):
            return None
        try:
            native = format_in(config, "config.json").name == "native"
        except CheckpointError:
            return None
        return NAME if native or user_quant == NAME else None

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, RoutedExperts):
            return ExpertsMethod(layer.moe_config)
        return LinearMethod() if isinstance(layer, LinearBase | ParallelLMHead) else None


def register() -> None:
    """Called by vLLM."""
    register_quantization_config(NAME)(GptqAoQuantization)
    DefaultModelLoader.get_all_weights = _all_weights


def _all_weights(self: Any, model_config: Any, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """In place of the method of vLLM's loader, which reads safetensors one by one."""
    if model_config.quantization != NAME:
        yield from _own_weights(self, model_config, model)
        return
    trusted = model_config.trust_remote_code
    where = {"revision": model_config.revision, "cache_dir": self.load_config.download_dir}
    directory = find_checkpoint(model_config.model, code=trusted, **where)
    with torch.device("cpu"):  # vLLM makes new tensors on the device
        yield from hub_tensors(directory, trust_remote_code=trusted)
