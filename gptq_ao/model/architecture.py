"""Which class a model is of, by the word of its config.json."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptq_ao.errors import CheckpointError
from gptq_ao.model.limits import check_counts

__all__ = ["model_class", "read_config", "refused"]


def read_config(directory: Path, *, trust_remote_code: bool = False) -> Any:
    """The config of the model in a directory.

    Args:
        trust_remote_code: whether code in the directory may be run.

    Raises:
        CheckpointError: there is none, or none that transformers can read, or only by code that is not to be run.
    """
    import transformers

    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{directory} has no config.json, so the model cannot be built from it: build it yourself and call "
            "load_quantized(model, directory)"
        )
    with refused(f"transformers {transformers.__version__} cannot read {path}"):
        check_counts(json.loads(path.read_text(encoding="utf-8")), path)
        try:
            return transformers.AutoConfig.from_pretrained(str(directory), trust_remote_code=trust_remote_code)
        except ValueError as e:
            if "trust_remote_code" in str(e):
                raise CheckpointError(_needs_code(directory)) from e
            raise


@contextlib.contextmanager
def refused(what: str) -> Iterator[None]:
    """Whatever transformers, torch or Python say of a wrong number, in one error."""
    try:
        yield
    except (CheckpointError, ImportError):
        raise  # a package that is missing is no defect of the checkpoint
    except Exception as e:
        lines = " ".join(line.strip() for line in str(e).strip().splitlines()[:2])
        raise CheckpointError(f"{what}: {type(e).__name__}: {lines}") from e


def model_class(config: Any, directory: Path, *, trust_remote_code: bool = False) -> Any:
    """The class that the config names. Not a causal language model if it names another: that would be a part of it.

    Raises:
        CheckpointError: transformers does not have it, nor code in the directory that may be run.
    """
    import transformers
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    names = getattr(config, "architectures", None) or []
    name = str(names[0]) if len(names) == 1 else ""
    # A class of transformers itself: a name in a config must not lead to code that came with the checkpoint.
    kind: Any = getattr(transformers, name, None) if name else None
    codes = (getattr(config, "auto_map", None) or {}).values()
    own = next((str(code) for code in codes if str(code).endswith(f".{name}")), None)
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
