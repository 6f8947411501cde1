"""A directory that appears when everything in it is there.

Files grow in a temporary directory beside its place, which is renamed at the end and removed if anything fails.
"""

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn

from gptq_ao.checkpoint.files.durable import sync_tree
from gptq_ao.checkpoint.files.model_config import config_of
from gptq_ao.checkpoint.files.paths import INDEX
from gptq_ao.checkpoint.files.shards import ShardWriter
from gptq_ao.checkpoint.files.shared import shared_directory
from gptq_ao.checkpoint.files.side_files import copy_side_files
from gptq_ao.distributed.ranks import ALONE, Ranks
from gptq_ao.errors import CheckpointError

__all__ = ["OutputDirectory", "add_settings", "as_json", "check_empty", "check_space", "disk_errors"]


class OutputDirectory:
    """To be used in a `with` statement, which removes what is not finished.

    Args:
        within: where to put the temporary directory, on the same disk, if what it is made of will be removed when it
            has its name, so that it has to be on the disk by then; None: beside `directory`.
        ranks: that write shards into it. The first makes it, and gives it its name.

    Raises:
        CheckpointError: the directory holds something, or cannot be written; not all ranks see it.
    """

    def __init__(self, directory: Path, max_shard_bytes: int, within: Path | None = None, ranks: Ranks = ALONE) -> None:
        # Without links and ".": it is its name that a finished directory gets.
        self.directory, self._ranks, self._durable = directory.resolve(), ranks, within is not None
        made = None
        if ranks.first:
            check_empty(directory)
            with disk_errors(self.directory):
                self.directory.parent.mkdir(parents=True, exist_ok=True)
                # On the same disk, as in the same parent: a rename there is one step, with nothing to copy.
                place = within or self.directory.parent
                made = Path(tempfile.mkdtemp(prefix=f".{self.directory.name}-", dir=place))
        with disk_errors(self.directory):
            self._temporary = shared_directory(made, self.directory.parent, ranks)
        self._shards = ShardWriter(self._temporary, max_shard_bytes, ranks)

    def __enter__(self) -> "OutputDirectory":
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None) -> None:
        # After success it has its new name, and there is nothing to remove.
        if self._ranks.first:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def check_space(self, need: int) -> None:
        """
        Raises:
            CheckpointError: the disk has fewer free bytes.
        """
        check_space(self.directory, need)

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over tensors on the CPU, name → tensor; the caller must not change them any more."""
        with disk_errors(self.directory):
            self._shards.add(tensors)

    def get(self, name: str) -> Tensor:
        """A tensor that was added."""
        return self._shards.get(name)

    def finish_shards(self) -> dict[str, str]:
        """Returns tensor → file. After that, no tensor can be added."""
        with disk_errors(self.directory):
            return self._shards.finish()

    def finish(
        self,
        model: nn.Module,
        tokenizer: Any,
        placed: Mapping[str, str],
        quantization: Mapping[str, Any] | None,
        texts: Mapping[str, str],
        files: Mapping[str, Path],
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """Write what else belongs to a Hugging Face model, then give all of it its name.

        Args:
            placed: tensor → file.
            quantization: the `quantization_config` of config.json; None: the weights are not quantized.
            texts: other file → its content, in the order in which they are written.
            files: what is copied, unless there is one of that name: path → source.
            settings: further keys of config.json.
        """
        parts: tuple[Any, ...] = (config_of(model, quantization), getattr(model, "generation_config", None), tokenizer)
        with disk_errors(self.directory):
            for part in parts:
                if hasattr(part, "save_pretrained"):
                    part.save_pretrained(str(self._temporary))
            add_settings(self._temporary / "config.json", settings or {})
            copy_side_files({name: f for name, f in files.items() if name not in texts}, self._temporary)
            sizes = sum(p.stat().st_size for p in self._temporary.glob("*.safetensors"))
            index = {"metadata": {"total_size": sizes}, "weight_map": dict(sorted(placed.items()))}
            for name, text in {INDEX: as_json(index), **texts}.items():
                (self._temporary / name).write_text(text, encoding="utf-8")
            self._temporary.chmod(0o755)  # mkdtemp makes it private
            if self._durable:
                sync_tree(self._temporary)
            # The very last step: a directory that has its name is complete.
            self._temporary.replace(self.directory)


def check_space(path: Path, need: int) -> None:
    """
    Raises:
        CheckpointError: the disk that `path` will be on has fewer free bytes.
    """
    free = shutil.disk_usage(path.parent).free
    if need > free:
        raise CheckpointError(f"the disk of {path} is full: {need} bytes needed, {free} free")


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Within it, what the disk refuses is a CheckpointError that names `path`."""
    try:
        yield
    except (OSError, SafetensorError) as e:
        # safetensors (in Rust) does not raise an OSError: its message tells that the disk is full. 28 is ENOSPC.
        full = getattr(e, "errno", None) == errno.ENOSPC or "StorageFull" in str(e) or "code: 28" in str(e)
        what = "the disk is full" if full else str(e)
        raise CheckpointError(f"{path} could not be written, nothing is left of it: {what}") from e


def check_empty(directory: Path) -> None:
    """
    Raises:
        CheckpointError: the directory holds something, is a file, or cannot be replaced by the finished one.
    """
    # A link that leads nowhere is there as well.
    if os.path.lexists(directory) and (not directory.is_dir() or any(directory.iterdir())):
        raise CheckpointError(f"{directory} exists and is not empty: nothing is overwritten, choose another directory")
    if os.path.ismount(directory):  # such as a volume of a container
        raise CheckpointError(
            f"{directory} is where a disk is mounted: choose a directory in it, {directory / 'model'}"
        )


def add_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Add keys to a config.json."""
    if settings:
        path.write_text(as_json({**json.loads(path.read_text(encoding="utf-8")), **settings}), encoding="utf-8")


def as_json(content: object) -> str:
    return json.dumps(content, indent=1) + "\n"
