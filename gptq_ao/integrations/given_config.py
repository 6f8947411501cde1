"""Which `quantization_config` counts in `from_pretrained`: that of the checkpoint, under whatever name, if the one that
is given agrees with it.

Programs give a GPTQConfig to choose kernels of other libraries. That is no reason not to load; another number of bits
is. transformers itself compares the names of the two classes.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from gptq_ao.checkpoint.files.directory import method_of
from gptq_ao.checkpoint.files.model_config import take_mlx
from gptq_ao.errors import ConfigError
from gptq_ao.integrations.hf_quantizer import CheckpointConfig, GptqAoConfig, GptqAoQuantizer
from gptq_ao.model.limits import check_counts

__all__ = ["checked_choice", "merge_with", "native_too"]

SETTINGS = ("bits", "group_size", "sym", "desc_act")  # of both, if they have them: what the files hold


def merge_with(merge: Callable[..., Any], parse: Callable[[Any], Any]) -> Callable[..., Any]:
    """In place of transformers' `AutoHfQuantizer.merge_quantization_configs`, for checkpoints that this package loads.

    Args:
        merge: transformers' own.
        parse: makes a config of a checkpoint's dict.

    The result raises a ConfigError if the given config contradicts the checkpoint's.
    """

    def merged(quantization_config: Any, quantization_config_from_args: Any) -> Any:
        if quantization_config_from_args is not None:
            stored = parse(quantization_config) if isinstance(quantization_config, dict) else quantization_config
            if isinstance(stored, CheckpointConfig):
                _check(stored.content, quantization_config_from_args)
                return stored
        return merge(quantization_config, quantization_config_from_args)

    return merged


def native_too(ask: Callable[[Any], Any], answer: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """In place of functions of transformers that stop at a `quantization_config` without "quant_method", as that of the
    native format and of MLX is.

    Args:
        ask: transformers' own.
        answer: what is called with a config of one of these.
    """

    @functools.wraps(ask)
    def asked(config: Any) -> Any:
        return (answer if isinstance(config, dict) and method_of(config) in ("gptq_ao", "mlx") else ask)(config)

    return asked


def checked_choice(choose: Callable[..., Any]) -> Callable[..., Any]:
    """In place of transformers' `get_hf_quantizer`, which is called before a model is built.

    Early versions of compressed-tensors wrote `compression_config`, which transformers does not look at: it would take
    the quantized weights for missing ones, and go on with random numbers.

    Args:
        choose: transformers' own, whose first argument is the model's config.

    The result raises a CheckpointError if the config of a checkpoint that this package loads has a size that no model
    has.
    """

    @functools.wraps(choose)
    def chosen(config: Any, *args: Any, **kwargs: Any) -> Any:
        old = getattr(config, "compression_config", None)
        if isinstance(old, dict) and getattr(config, "quantization_config", None) is None:
            config.quantization_config = {"quant_method": "compressed-tensors", **old}
        mlx = take_mlx(config)  # mlx-lm looks there only, and not all files have the other one
        if mlx is not None and getattr(config, "quantization_config", None) is None:
            config.quantization_config = mlx
        found = choose(config, *args, **kwargs)
        if isinstance(found[0], GptqAoQuantizer):
            check_counts(config.to_dict(), "config.json")
        return found

    return chosen


def _check(stored: Mapping[str, Any], given: Any) -> None:
    name = type(given).__name__
    if isinstance(given, GptqAoConfig):
        raise ConfigError(
            f"the checkpoint is quantized already (quant_method {method_of(stored)!r}): leave quantization_config "
            "out to load it, or quantize the original model"
        )
    settings = given if isinstance(given, dict) else vars(given)
    method = getattr(settings.get("quant_method"), "value", settings.get("quant_method", method_of(stored)))
    differ = {"quant_method": (method, method_of(stored))} if method != method_of(stored) else {}
    # What nobody has chosen contradicts nothing. A class may leave settings to the one that it is made of.
    kinds: Any = () if isinstance(given, dict) else reversed(type(given).__mro__)
    defaults = {n: p for kind in kinds for n, p in inspect.signature(kind.__init__).parameters.items()}
    for key in SETTINGS:
        default = getattr(defaults.get(key), "default", None)
        if key in settings and key in stored and settings[key] not in (stored[key], default):
            differ[key] = (settings[key], stored[key])
    if settings.get("dequantize"):
        raise ConfigError(f"{name}(dequantize=True): leave quantization_config out, and call model.dequantize()")
    if differ:
        text = ", ".join(f"{key} {ours!r}, the files {theirs!r}" for key, (ours, theirs) in differ.items())
        raise ConfigError(
            f"the {name} that is given contradicts the checkpoint, which is quantized already: it says {text}. Leave "
            "quantization_config out: what the files hold decides"
        )
