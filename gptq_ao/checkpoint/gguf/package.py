"""What knows the names and numbers of GGUF: the package `gguf`, by the authors of llama.cpp, and transformers."""

from importlib import import_module
from typing import Any

from gptq_ao.errors import ConfigError

__all__ = ["gguf_package", "transformers_reader"]


def gguf_package() -> Any:
    """
    Raises:
        ConfigError: it is not installed.
    """
    try:
        import gguf
    except ImportError as e:
        raise ConfigError(
            f"GGUF files need the package gguf, which cannot be imported ({e}): pip install 'gptq_ao[gguf]'"
        ) from e
    return gguf


def transformers_reader() -> Any:
    """
    Raises:
        ConfigError: this version of transformers has none, or another one.
    """
    try:
        return import_module("transformers.modeling_gguf_pytorch_utils")
    except ImportError as e:
        raise ConfigError(
            "GGUF files are written by the tables with which transformers reads them (modeling_gguf_pytorch_utils), "
            f"which the installed version lacks ({e}). Version 5.23 has them: pip install transformers==5.23.0"
        ) from e
