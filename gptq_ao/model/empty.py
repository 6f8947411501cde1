"""A Hugging Face model as an empty frame: every module, no weight in memory."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from gptq_ao.model.architecture import model_class, read_config, refused
from gptq_ao.model.limits import Limits

__all__ = ["empty_model"]


def empty_model(
    directory: Path,
    dtype: torch.dtype | None = None,
    *,
    otherwise: torch.dtype | None = None,
    shapes: Iterable[Sequence[int]] | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """The model that `config.json` describes, parameters on the meta device, buffers computed. In eval mode.

    Args:
        dtype: that of the parameters; None: what the config says, or `otherwise` if it says nothing.
        shapes: those of the tensors in the files, which bound what is built.
        trust_remote_code: whether code in the directory may be run.

    Raises:
        CheckpointError: there is no config; it names a model that transformers does not have and whose code is not to
            be run; or it describes one that cannot be built, or is larger than can be.
    """
    config = read_config(directory, trust_remote_code=trust_remote_code)
    kind = model_class(config, directory, trust_remote_code=trust_remote_code)
    where = directory / "config.json"
    with refused(f"{kind.__name__} cannot be built from {where}"), _parameters_on_meta(Limits(shapes, where)):
        model: Any = kind._from_config(config, dtype=dtype or config.dtype or otherwise)
    if (directory / "generation_config.json").is_file() and getattr(model, "generation_config", None) is not None:
        # How it generates is in a file of its own, which a model built from its config does not know.
        model.generation_config = type(model.generation_config).from_pretrained(str(directory))
    built: nn.Module = model.eval()
    return built


@contextlib.contextmanager
def _parameters_on_meta(limits: Limits) -> Iterator[None]:
    """Parameters that modules create meanwhile take no memory. Buffers do: some are computed, not loaded."""
    # Not `torch.device("meta")`, which would also take the buffers: rotary frequencies are in no file, they must be
    # computed.
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        limits.count_parameter()
        # Each parameter's memory is freed as soon as it is registered, so the model never takes more than one of them.
        if parameter is not None and parameter.device.type != "meta":
            empty = torch.empty_like(parameter, device="meta")
            module._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)

    with patch.object(nn.Module, "register_parameter", register_on_meta), limits:
        yield
