"""A checkpoint while it is written: shards as they fill, the manifest last, all of it or nothing.

It grows in a temporary directory beside its place, which is renamed when everything is there and removed otherwise.
"""

import contextlib
import copy
import errno
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from gptq_ao.errors import CheckpointError
from gptq_ao.grid import group_columns
from gptq_ao.manifest import MANIFEST, QuantizedEntry, format_version
from gptq_ao.passes.records import Selection
from gptq_ao.shards import NAME_OF, ShardWriter
from gptq_ao.stored import from_stored, stored_entry, stored_parts
from gptq_ao.tensor import GroupTensor

__all__ = ["CheckpointWriter", "result_size", "state_names", "stored_bytes"]


def state_names(model: nn.Module) -> list[list[str]]:
    """The names of every parameter and persistent buffer, in the model's order.

    Raises:
        CheckpointError: the model has state that is no tensor.
    """
    names: dict[int, list[str]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"state {name!r} is a {type(value).__name__}, not a tensor: it cannot be saved")
        names.setdefault(id(value), []).append(name)
    return list(names.values())


def stored_bytes(contents: Mapping[str, Tensor | QuantizedEntry]) -> int:
    """What such parameters take in files. Of the tensors, only shape and dtype matter."""
    total = 0
    for name, what in contents.items():
        what = stored_entry(what) if isinstance(what, GroupTensor) else what
        total += what.stored_bytes(name) if isinstance(what, QuantizedEntry) else what.nbytes
    return total


def result_size(model: nn.Module, selection: Selection) -> int:
    """What the model takes in files when the selected weights are quantized."""
    state = model.state_dict(keep_vars=True)
    contents: dict[str, Tensor | QuantizedEntry] = {first: state[first] for first, *_ in state_names(model)}
    for name, c in selection.settings.items():
        k = selection.layouts[name].in_features
        rows = contents[name].numel() // k  # type: ignore[union-attr]  # those of all matrices of a stack
        permuted = c.act_order == "group" and c.method == "gptq"
        contents[name] = QuantizedEntry(c.bits, (rows, k), k // group_columns(k, c.group_size), "", False, permuted)
    return stored_bytes(contents)


class CheckpointWriter:
    """To be used in a `with` statement, which removes what is not finished.

    Raises:
        CheckpointError: the directory holds something, or cannot be written.
    """

    def __init__(self, directory: Path, max_shard_bytes: int) -> None:
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise CheckpointError(
                f"{directory} exists and is not empty: nothing is overwritten, choose another directory"
            )
        self.directory = directory
        self._entries: dict[str, QuantizedEntry] = {}
        self._dense: dict[str, dict[str, Any]] = {}
        self._tied: dict[str, str] = {}
        with self._disk_errors():
            directory.parent.mkdir(parents=True, exist_ok=True)
            self._temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
        self._shards = ShardWriter(self._temporary, max_shard_bytes)

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None) -> None:
        shutil.rmtree(self._temporary, ignore_errors=True)

    def __contains__(self, name: str) -> bool:
        return name in self._entries or name in self._dense

    def check_space(self, need: int) -> None:
        free = shutil.disk_usage(self.directory.parent).free
        if need > free:
            raise CheckpointError(f"the disk of {self.directory} is full: {need} bytes needed, {free} free")

    def add(self, name: str, value: Tensor) -> None:
        """Store a parameter or buffer, quantized or not."""
        if isinstance(value, GroupTensor):
            self._entries[name] = stored_entry(value)
            parts = stored_parts(name, value)
        else:
            self._dense[name] = {"dtype": _dtype_name(name, value), "shape": list(value.shape)}
            # A copy: a view would keep all it is a view of, and a buffer may change.
            parts = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format)}
        with self._disk_errors():
            self._shards.add(parts)

    def add_rest(self, model: nn.Module, get: Callable[[str], Tensor]) -> None:
        """Store what `model` has and was not added: each tensor by its first name, and which other names it has."""
        for first, *others in state_names(model):
            if first not in self:
                self.add(first, get(first))
            self._tied |= dict.fromkeys(others, first)

    def get(self, name: str) -> GroupTensor:
        """A quantized weight that was added."""
        return from_stored(name, self._entries[name], self._shards.get, self.directory)

    def finish(self, model: nn.Module, tokenizer: Any) -> None:
        """Write the rest: what else belongs to a Hugging Face model, and the manifest; then give all of it its name."""
        with self._disk_errors():
            shards = self._shards.finish()
            parts: tuple[Any, ...] = (_config(model), getattr(model, "generation_config", None), tokenizer)
            for part in parts:
                if hasattr(part, "save_pretrained"):
                    part.save_pretrained(str(self._temporary))
            manifest = {
                "format": "gptq_ao",
                "format_version": format_version(self._entries),
                "quantized": {name: _json(e) for name, e in self._entries.items()},
                "dense": self._dense,
                "tied": self._tied,
                "shards": shards,
            }
            (self._temporary / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
            self._temporary.chmod(0o755)  # mkdtemp makes it private
            self._temporary.replace(self.directory)

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as e:
            full = getattr(e, "errno", None) == errno.ENOSPC or "StorageFull" in str(e) or "code: 28" in str(e)
            what = "the disk is full" if full else str(e)
            raise CheckpointError(f"{self.directory} could not be written, nothing is left of it: {what}") from e


def _json(entry: QuantizedEntry) -> dict[str, Any]:
    return {field: value for field, value in asdict(entry).items() if value is not None}


def _dtype_name(name: str, t: Tensor) -> str:
    if t.dtype not in NAME_OF:
        raise CheckpointError(f"{name!r} is of {t.dtype}, which cannot be saved")
    return NAME_OF[t.dtype]


def _config(model: nn.Module) -> Any:
    """The model's config, which names the class to build; a model made from a config does not say that by itself."""
    config: Any = copy.deepcopy(getattr(model, "config", None))
    if hasattr(config, "save_pretrained"):
        config.architectures = [type(model).__name__]
    return config
