"""Models and tokenizers from a local Hugging Face directory or a hub id. Safetensors only, no remote code."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gptq_ao.checkpoint import load_quantized
from gptq_ao.errors import CheckpointError
from gptq_ao.manifest import MANIFEST, check_weight_map

__all__ = ["config_directory", "load_model", "load_tokenizer"]


def load_model(source: str, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> nn.Module:
    """A causal language model in eval mode: quantized, if `source` is a directory that `save_quantized` wrote.

    Args:
        dtype: of an unquantized model; None: as stored.

    Raises:
        CheckpointError: the directory is unsafe or incomplete, or the model cannot be loaded.
    """
    import transformers

    directory = Path(source)
    if (directory / MANIFEST).is_file():
        return load_quantized(directory, device=device).to(device)
    if directory.is_dir():
        check_weight_map(directory)
    try:
        with _bars_on_a_terminal_only():
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype or "auto", trust_remote_code=False, use_safetensors=True
            )
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{source!r} cannot be loaded as a causal language model: {e}") from e
    return model.eval().to(device)


def config_directory(source: str) -> Path:
    """The directory with the config.json of a directory or a hub id, of which nothing else is fetched.

    Raises:
        CheckpointError: there is no such model.
    """
    from transformers.utils import cached_file

    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(str(cached_file(source, "config.json"))).parent
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{source!r} is no directory, and no model of the hub that can be read: {e}") from e


def load_tokenizer(source: str) -> Any:
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as e:
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
