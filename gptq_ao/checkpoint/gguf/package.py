"""The package `gguf`, by the authors of llama.cpp, which knows the names and numbers of the format."""

from typing import Any

from gptq_ao.errors import ConfigError

__all__ = ["gguf_package"]


def gguf_package() -> Any:
    """
    Raises:
        ConfigError: it is not installed.
    """
    try:
        import gguf
    except ImportError as e:
        raise ConfigError(
            f"GGUF files are written with the package gguf, which cannot be imported ({e}): pip install 'gptq_ao[gguf]'"
        ) from e
    return gguf
