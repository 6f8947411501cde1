"""transformers: models and tokenizers from a local directory or a hub id, and who loads which quantized checkpoint.

Safetensors only, no remote code.
"""

import contextlib
import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import modeling_utils
from transformers.quantizers import auto

from gptq_ao.checkpoint.files.directory import method_of
from gptq_ao.checkpoint.files.find import find_checkpoint, local_directory
from gptq_ao.checkpoint.files.paths import check_weight_map
from gptq_ao.checkpoint.formats import FORMATS, format_of
from gptq_ao.checkpoint.load import load_quantized
from gptq_ao.errors import CheckpointError, ConfigError
from gptq_ao.integrations.given_config import checked_choice, merge_with, native_too
from gptq_ao.integrations.hf_quantizer import CheckpointConfig, GptqAoConfig, GptqAoQuantizer, TorchAoQuantizer
from gptq_ao.integrations.saving import saving_quantized
from gptq_ao.model.architecture import model_class, read_config
from gptq_ao.report import names_of

__all__ = [
    "GptqAoConfig",
    "config_directory",
    "load_model",
    "load_tokenizer",
    "load_with_gptq_ao",
    "load_with_transformers",
    "register",
]

_replaced: dict[str, tuple[Any, Any]] = {}  # quant_method → transformers' own quantizer and config


def register() -> None:
    """Make `from_pretrained` know those formats for which transformers has no loader, or none that can run.

    Importing this module does that; importing gptq_ao imports it as soon as transformers' models are there.
    """
    hub: Any = auto.AutoHfQuantizer
    parser: Any = auto.AutoQuantizationConfig
    hub.supports_quant_method = staticmethod(native_too(hub.supports_quant_method, lambda config: True))
    parser.from_dict = staticmethod(native_too(parser.from_dict, CheckpointConfig.from_dict))
    hub.merge_quantization_configs = staticmethod(merge_with(hub.merge_quantization_configs, parser.from_dict))
    modeling_utils.get_hf_quantizer = checked_choice(_stacks_here(modeling_utils.get_hf_quantizer))
    saved_model: Any = modeling_utils.PreTrainedModel
    saved_model.save_pretrained = saving_quantized(saved_model.save_pretrained)
    auto.AUTO_QUANTIZER_MAPPING["torchao"] = TorchAoQuantizer
    for format in FORMATS.values():
        # No loader of transformers is displaced.
        if not format.needs:
            auto.AUTO_QUANTIZER_MAPPING[format.quant_method] = GptqAoQuantizer
            auto.AUTO_QUANTIZATION_CONFIG_MAPPING[format.quant_method] = CheckpointConfig
        # transformers has a loader but it would only raise: a package it needs is not installed.
        elif any(importlib.util.find_spec(package) is None for package in format.needs):
            load_with_gptq_ao(format.quant_method)


def _stacks_here(choose: Callable[..., Any]) -> Callable[..., Any]:
    """In place of transformers' `get_hf_quantizer`: GPTQ checkpoints of models whose experts transformers stacks are
    loaded here, even where its own loader has what it needs, since that leaves the stacks at random."""

    @functools.wraps(choose)
    def chosen(config: Any, *args: Any, **kwargs: Any) -> Any:
        stored = getattr(config, "quantization_config", None)
        method = method_of(stored) if isinstance(stored, dict) else getattr(stored, "quant_method", None)
        before = set(_replaced)
        if method == "gptq" and _stacks(config):
            load_with_gptq_ao("gptq")
        try:
            return choose(config, *args, **kwargs)
        finally:
            load_with_transformers(*(set(_replaced) - before))

    return chosen


def _stacks(config: Any) -> bool:
    """Whether what lies in the files one by one ("experts.*.w1") is one parameter of the model."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    types = {config.model_type, getattr(config.get_text_config(decoder=True), "model_type", None)}
    conversions = [c for t in types if t for c in get_checkpoint_conversion_mapping(t) or ()]
    return any("*." in source for c in conversions for source in c.source_patterns)


def load_with_gptq_ao(*quant_methods: str) -> None:
    """`from_pretrained` loads checkpoints of these methods, "gptq", "compressed-tensors" or "awq", into the tensors of
    this package, from now on and in this process.

    Raises:
        ConfigError: it is another method.
    """
    for method in _known(quant_methods):
        own = (auto.AUTO_QUANTIZER_MAPPING[method], auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method])
        # Not overwritten by a second call, which would find this package's classes there.
        _replaced.setdefault(method, own)
        auto.AUTO_QUANTIZER_MAPPING[method] = GptqAoQuantizer
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = CheckpointConfig


def load_with_transformers(*quant_methods: str) -> None:
    """The reverse of `load_with_gptq_ao`: transformers' own loaders, which need gptqmodel (with optimum or
    accelerate), or compressed-tensors.

    Raises:
        ConfigError: it is another method.
    """
    for method in _known(quant_methods):
        if method in _replaced:
            quantizer, config = _replaced.pop(method)
            auto.AUTO_QUANTIZER_MAPPING[method] = quantizer
            auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = config


def _known(quant_methods: tuple[str, ...]) -> tuple[str, ...]:
    known = dict.fromkeys(f.quant_method for f in FORMATS.values() if f.needs)
    for method in quant_methods:
        if method not in known:
            raise ConfigError(f"quant_method is {method!r}: give one of {', '.join(known)}")
    return quant_methods


def load_model(
    source: str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """The model of a directory or a hub id, of the class that its config names, in eval mode: quantized, if it is a
    quantized checkpoint that can be read.

    Args:
        dtype: that of an unquantized model; None: the stored one.
        trust_remote_code: run the code that comes with the model.

    Raises:
        CheckpointError: the directory is unsafe or incomplete, or the model cannot be loaded.
    """
    directory = find_checkpoint(source, code=trust_remote_code)
    if format_of(directory) is not None:
        # `.to`, since buffers that are in no file were computed on the CPU.
        return load_quantized(directory, device=device, trust_remote_code=trust_remote_code).to(device)
    # Before transformers opens anything: it would follow an index that names files elsewhere.
    check_weight_map(directory)
    config = read_config(directory, trust_remote_code=trust_remote_code)
    kind = model_class(config, directory, trust_remote_code=trust_remote_code)
    try:
        with _bars_on_a_terminal_only():
            # Safetensors only: other weight files are pickles, which can run code.
            model, info = kind.from_pretrained(
                str(directory),
                config=config,
                dtype=dtype or "auto",
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, ImportError) as e:
        raise CheckpointError(f"{source!r} cannot be loaded as a {kind.__name__}: {e}") from e
    # transformers would go on with random numbers in their place.
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(f"{source!r} does not fit the {type(model).__name__}: it lacks {names_of(missing)}")
    return model.eval().to(device)


def config_directory(source: str) -> Path:
    """The directory with the config.json of a directory or a hub id, of which nothing else is fetched.

    Raises:
        CheckpointError: there is no such model.
    """
    from transformers.utils import cached_file

    directory = local_directory(source)
    if directory is not None:
        return directory
    try:
        return Path(str(cached_file(source, "config.json"))).parent
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{source!r} is neither a directory nor a model of the hub that can be read: {e}") from e


def load_tokenizer(source: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a directory or a hub id.

    Raises:
        CheckpointError: there is no such model, or it has none that can be loaded.
    """
    local_directory(source)
    try:
        return transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as e:  # which one depends on its kind, and on what is missing or damaged
        raise CheckpointError(f"{source!r} has no tokenizer that can be loaded: {e}") from e


@contextlib.contextmanager
def _bars_on_a_terminal_only() -> Iterator[None]:
    """transformers draws its progress bars into files and pipes as well."""
    from transformers.utils import logging

    silence = logging.is_progress_bar_enabled() and not sys.stderr.isatty()
    if silence:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if silence:
            logging.enable_progress_bar()


register()
