"""What lies beside the weights of a model and belongs to it: tokenizer, processor, chat template, code, license …"""

import shutil
from collections.abc import Mapping
from pathlib import Path

from gptq_ao.checkpoint.files.directory import weight_files
from gptq_ao.checkpoint.files.paths import MANIFEST, confined
from gptq_ao.errors import CheckpointError
from gptq_ao.presentation.files import FOLDER, is_report

__all__ = ["copy_side_files", "side_files"]

# Everything that is not known to be something else is taken along: which files a model needs is not known here.
_WEIGHTS: tuple[str, ...] = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".pkl",
    ".h5",
    ".msgpack",
    ".ot",
    ".gguf",
    ".npz",
    ".npy",
)
_WEIGHTS += (".onnx", ".onnx_data", ".pt2", ".tflite", ".mlmodel", ".nemo", ".distcp")
# Written anew, since what they say holds for the weights beside them.
_OF_THE_WEIGHTS = ("config.json", "quantize_config.json", "quant_config.json", "README.md", MANIFEST)
# More than any tokenizer has. What is larger is data, or weights in a file of an unknown kind.
_MAX_BYTES = 64 * 2**20


def side_files(directory: Path) -> tuple[dict[str, Path], list[str]]:
    """What belongs to a model beside its weights, by its path in the directory; and the paths there of what is not
    taken along: other files with weights, folders that hold some, files that are too large, links to other places.
    Hidden files are in neither.
    """
    try:
        read = weight_files(directory)
    except CheckpointError:  # its weights are not in safetensors
        read = set()
    taken: dict[str, Path] = {}
    left: list[str] = []
    for path in sorted(directory.iterdir()):
        index = path.name.endswith(".index.json")
        if _hidden(path) or index or path.name in _OF_THE_WEIGHTS or path.name in read or _is_ours(path):
            continue
        files = [path] if path.is_file() else [p for p in sorted(path.rglob("*")) if p.is_file() and not _hidden(p)]
        # A folder with weights is another model, or a part of one: its other files mean nothing without them.
        if not all(_small(directory, p) for p in files):
            left.append(path.name)
        else:
            taken |= {str(p.relative_to(directory)): p for p in files}
    return taken, left


def copy_side_files(files: Mapping[str, Path], out: Path) -> None:
    """Copy files, path in `out` → source, byte by byte. What is there already stays.

    Raises:
        OSError: a file cannot be read or written.
    """
    for name, source in files.items():
        if not (out / name).exists():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, out / name)


def _hidden(path: Path) -> bool:
    """Such as `.git`, and the `.cache` of a download."""
    return path.name.startswith(".") or "__pycache__" in path.parts


def _is_ours(path: Path) -> bool:
    """A report on how the weights beside it were made."""
    return path.name == FOLDER and path.is_dir() and is_report(path)


def _small(directory: Path, path: Path) -> bool:
    """Whether it is no file with weights, not too large, and in the directory."""
    try:
        confined(directory, str(path.relative_to(directory)))
    except CheckpointError:
        return False
    return not path.name.endswith(_WEIGHTS) and path.stat().st_size <= _MAX_BYTES
