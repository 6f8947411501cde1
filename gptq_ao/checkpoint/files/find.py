"""Where a checkpoint is: in a directory of this machine, or on the hub, from where its files are fetched."""

import contextlib
import functools
import os
import re
from pathlib import Path

from gptq_ao.checkpoint.files.paths import MANIFEST
from gptq_ao.errors import CheckpointError

__all__ = ["find_checkpoint", "local_directory"]

# What is read. `*` does not stop at a slash, so without `_NESTED` it would fetch subfolders too.
_NEEDED = ("config.json", "generation_config.json", MANIFEST, "quant*_config.json", "*.safetensors", "*.index.json")
_NESTED = "*/*"
# Of everything else, not: weights in formats that are never read, pickles and those of other frameworks.
_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.ot", "*.onnx*", "*.gguf", "*.tflite")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def find_checkpoint(
    source: str | Path,
    *,
    subfolder: str = "",
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    code: bool = False,
    whole: bool = False,
) -> Path:
    """The directory that holds the files.

    Args:
        source: a directory, or the id of a model on the hub.
        subfolder: place of the files in it.
        revision, cache_dir: of the hub, as `huggingface_hub` takes them.
        code: whether to fetch Python files too.
        whole: whether to fetch all that comes along when the model is saved again.

    Raises:
        CheckpointError: there is no such directory or model, or it cannot be fetched.
    """
    if Path(subfolder).is_absolute() or ".." in Path(subfolder).parts:
        raise CheckpointError(f"subfolder is {subfolder!r}: give the path of a folder inside of {source}")
    root = local_directory(source)
    if root is None:
        needed = None if whole else _needed(subfolder, code)
        root = _fetch(str(source), needed, revision, cache_dir)
    if not (root / subfolder).is_dir():
        raise CheckpointError(f"{source} has no folder {subfolder!r}")
    return root / subfolder


def local_directory(source: str | Path) -> Path | None:
    """The directory of this machine; None: it can only be the id of a model on the hub.

    Raises:
        CheckpointError: it is a file, or a path where nothing is.
    """
    if os.path.isfile(source):
        if str(source).endswith(".gguf"):
            raise CheckpointError(f"{source} is a GGUF file, which only `gptq-ao quantize` reads")
        raise CheckpointError(f"{source} is a file: give the directory that it is in")
    if os.path.isdir(source):
        return Path(source)
    if not _HUB_ID.fullmatch(str(source)):
        raise CheckpointError(f"{source} does not exist: give a directory, or the id of a model on the hub")
    return None


def _needed(subfolder: str, code: bool) -> list[str]:
    patterns = (*_NEEDED, *(("*.py",) if code else ()))
    return [f"{subfolder}/{pattern}" if subfolder else pattern for pattern in patterns]


def _fetch(name: str, needed: list[str] | None, revision: str | None, cache_dir: str | Path | None) -> Path:
    """
    Args:
        needed: patterns of the files to fetch; None: all but weights that are never read.
    """
    from huggingface_hub import snapshot_download

    nested = needed is None or "/" in needed[0]
    ignored = [*(_OTHER_WEIGHTS if needed is None else ()), *(() if nested else (_NESTED,))]
    fetch = functools.partial(
        snapshot_download,
        name,
        revision=revision,
        cache_dir=cache_dir,
        allow_patterns=needed,
        ignore_patterns=ignored or None,
    )
    try:
        return Path(fetch())
    except (OSError, ValueError) as e:
        # Not all versions of the hub's library look for what is here when they cannot reach it.
        with contextlib.suppress(OSError, ValueError):
            return Path(fetch(local_files_only=True))
        at = "" if revision is None else f" at revision {revision!r}"
        raise CheckpointError(
            f"{name!r} is neither a directory here, nor a model of the hub that can be read{at}: {_first_line(e)}"
        ) from e


def _first_line(e: Exception) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0]
