"""A Hugging Face model as an empty frame: every module, no weight in memory."""

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from gptq_ao.errors import CheckpointError
from gptq_ao.model.limits import Limits, check_counts

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
    if not (directory / "config.json").is_file():
        raise CheckpointError(
            f"{directory} has no config.json, so the model cannot be built from it: build it yourself and call "
            "load_quantized(model, directory)"
        )
    config = _config(directory, trust_remote_code)
    kind = _kind(directory, config, trust_remote_code)
    where = directory / "config.json"
    with _cannot(f"{kind.__name__} cannot be built from {where}"), _parameters_on_meta(Limits(shapes, where)):
        model: Any = kind._from_config(config, dtype=dtype or config.dtype or otherwise)
    if (directory / "generation_config.json").is_file() and getattr(model, "generation_config", None) is not None:
        # A model built from its config does not have it, and it is saved with the model again.
        model.generation_config = type(model.generation_config).from_pretrained(str(directory))
    built: nn.Module = model.eval()
    return built


def _config(directory: Path, trust_remote_code: bool) -> Any:
    import transformers

    path = directory / "config.json"
    with _cannot(f"transformers {transformers.__version__} cannot read {path}"):
        check_counts(json.loads(path.read_text(encoding="utf-8")), path)
        try:
            return transformers.AutoConfig.from_pretrained(str(directory), trust_remote_code=trust_remote_code)
        except ValueError as e:
            if "trust_remote_code" in str(e):
                raise CheckpointError(_needs_code(directory)) from e
            raise


@contextlib.contextmanager
def _cannot(what: str) -> Iterator[None]:
    """Whatever transformers, torch or Python say of a wrong number, in one error."""
    try:
        yield
    except (CheckpointError, ImportError):
        raise  # a package that is missing is no defect of the checkpoint
    except Exception as e:
        lines = " ".join(line.strip() for line in str(e).strip().splitlines()[:2])
        raise CheckpointError(f"{what}: {type(e).__name__}: {lines}") from e


def _kind(directory: Path, config: Any, trust_remote_code: bool) -> Any:
    """The class of the model."""
    import transformers
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    names = getattr(config, "architectures", None) or []
    name = names[0] if len(names) == 1 else ""
    # A class of transformers itself: a name in a config must not lead to code that came with the checkpoint.
    kind: Any = getattr(transformers, str(name), None)
    own = next(
        (str(v) for v in (getattr(config, "auto_map", None) or {}).values() if str(v).endswith(f".{name}")), None
    )
    if own is not None and not trust_remote_code and kind is None:
        raise CheckpointError(_needs_code(directory))
    if own is not None and trust_remote_code:
        kind = get_class_from_dynamic_module(own, str(directory))
    if not (isinstance(kind, type) and hasattr(kind, "_from_config")):
        raise CheckpointError(
            f"{directory / 'config.json'} names the architecture {names}, which transformers "
            f"{transformers.__version__} does not have (code in a checkpoint is never run unless you trust it): build "
            "the model and call load_quantized(model, directory)"
        )
    return kind


def _needs_code(directory: Path) -> str:
    return (
        f"the model of {directory} is made by code of its own, which is not run: if you trust it, give "
        "trust_remote_code=True; or build the model and call load_quantized(model, directory)"
    )


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
