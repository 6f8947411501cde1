"""`save_pretrained` of a model that was quantized after transformers had made it, as Trainer's checkpoints need it."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gptq_ao.checkpoint.files.directory import config_keys
from gptq_ao.checkpoint.files.output_directory import add_settings
from gptq_ao.integrations.hf_quantizer import CheckpointConfig, GptqAoQuantizer
from gptq_ao.tensor import GroupTensor

__all__ = ["saving_quantized"]


def saving_quantized(save: Callable[..., Any]) -> Callable[..., Any]:
    """`PreTrainedModel.save_pretrained`, which writes the native format for models that hold weights of this package.

    Models that were loaded quantized bring the quantizer that writes them. The others get one while they are saved, and
    are afterwards what they were.
    """

    @functools.wraps(save)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        quantized = any(isinstance(p, GroupTensor) for p in self.parameters())
        quantizer = getattr(self, "hf_quantizer", None)
        if not quantized or quantizer is not None:
            saved = save(self, *args, **kwargs)
            path = Path(args[0] if args else kwargs["save_directory"]) / "config.json"
            if quantized and isinstance(quantizer, GptqAoQuantizer) and path.is_file():
                content = quantizer.quantization_config.to_dict()
                more = dict.fromkeys(config_keys(content), content)
                add_settings(path, {**quantizer.format.settings(self.config), **more})
            return saved
        before = dict(vars(self))
        self.hf_quantizer = GptqAoQuantizer(CheckpointConfig({"quant_method": "gptq_ao"}), pre_quantized=True)
        self.hf_quantizer.take_over(self)
        try:
            return save(self, *args, **kwargs)
        finally:
            vars(self).clear()
            vars(self).update(before)
            vars(self.config).pop("quantization_config", None)

    return save_pretrained
