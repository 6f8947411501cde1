"""Where the live activations of the calibration batches wait between two segments.

On the device that computes, as long as a budget allows; then in pinned host memory; then in files. What waits elsewhere
is brought back while the batch before it is still being computed.
"""

import itertools
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptq_ao.errors import ConfigError

__all__ = ["ActivationStore", "Budget", "compact", "pinned_bytes"]

Values = dict[str, Any]


@dataclass(frozen=True)
class Budget:
    """Bytes that waiting activations may take, in order of preference; what exceeds both goes to files.

    Attributes:
        device: on the device that computes; None: no limit.
        host: in host memory, if that is another place; None: no limit.
        folder: for a temporary directory with the files; None: the system's place for such.
    """

    device: int | None = None
    host: int | None = None
    folder: str | None = None


@dataclass(frozen=True)
class _File:
    """A tensor in a file, as bytes; `stride` is that of a tensor without gaps."""

    path: Path
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    def read(self) -> Tensor:
        flat = load_file(self.path)["bytes"].view(self.dtype)
        return flat.as_strided(self.shape, self.stride)


class _Waiting:
    """One value in its place: a tensor, or a file. Gives its bytes back when nothing refers to it."""

    def __init__(self, store: "ActivationStore", place: str, content: Tensor | _File, size: int) -> None:
        self.content = content
        store.used[place] += size
        store.peak[place] = max(store.peak[place], store.used[place])
        weakref.finalize(self, _release, store.used, place, size, getattr(content, "path", None))


class ActivationStore:
    """Per batch, the values that later segments read, by name. A context manager: its files are gone at the end.

    Attributes:
        device: that computes.
        used, peak: bytes now, and at most so far, by place: "device", "host", "disk".
    """

    def __init__(self, batches: Iterable[Values], device: torch.device, budget: Budget | None = None) -> None:
        self.used = {"device": 0, "host": 0, "disk": 0}
        self.peak = dict(self.used)
        self.device, self._budget = device, budget or Budget()
        # Copies run in a stream of their own, beside the segment that is being computed.
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._files: tempfile.TemporaryDirectory[str] | None = None
        self._number = itertools.count()
        self._batches: list[Values] = []
        try:
            self._fill(batches)
        except BaseException:
            self.__exit__()
            raise

    def _fill(self, batches: Iterable[Values]) -> None:
        before: Values = {}
        for batch in batches:
            # A mask that is the same in every batch is stored once.
            same = {n for n, t in batch.items() if n in before and _same(t, before[n])}
            stored = self._batches[-1] if self._batches else {}
            self._batches.append({n: stored[n] if n in same else self._put(t) for n, t in batch.items()})
            before = batch

    def __len__(self) -> int:
        return len(self._batches)

    def __enter__(self) -> "ActivationStore":
        return self

    def __exit__(self, *_: object) -> None:
        self._batches.clear()
        if self._files is not None:
            self._files.cleanup()

    def read(self, names: Iterable[str]) -> Iterator[Values]:
        """Batch by batch the values `names`, on the device; the next batch's on their way meanwhile."""
        names = list(names)
        coming = self._fetch(0, names) if self._batches else {}
        for index in range(len(self)):
            values = coming  # one batch ahead, never more: this is what `plan` counts as being on its way
            if self._side is not None:
                compute = torch.cuda.current_stream(self.device)
                compute.wait_stream(self._side)
                for t in values.values():
                    if isinstance(t, Tensor):
                        t.record_stream(compute)  # made in the side stream: its memory must not be reused too early
            coming = self._fetch(index + 1, names) if index + 1 < len(self) else {}
            yield values

    def replace(self, index: int, written: Values, keeps: Iterable[str]) -> None:
        """Keep of a batch only `keeps`: those in `written`, on the device, and of the rest what is stored."""
        old = self._batches[index]
        self._batches[index] = {}  # what is not kept gives way first: its room is needed for what was written
        kept = {n: old[n] for n in keeps if n not in written}
        del old
        self._batches[index] = {n: kept[n] if n in kept else self._put(compact(written[n])) for n in keeps}

    def _put(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value  # a size
        budget, size = self._budget, min(value.nbytes, value.untyped_storage().nbytes())  # less if it is expanded
        if budget.device is None or self.used["device"] + size <= budget.device:
            return _Waiting(self, "device", value.to(self.device), size)
        size = pinned_bytes(value)
        # Pinned, so that it is copied beside the computing stream. On the CPU there is no other place but files.
        if self._side is not None and (budget.host is None or self.used["host"] + size <= budget.host):
            host = torch.empty_like(value, device="cpu", pin_memory=True)
            return _Waiting(self, "host", host.copy_(value, non_blocking=True), size)
        file = self._write(value)
        return _Waiting(self, "disk", file, value.nbytes)

    def _write(self, value: Tensor) -> _File:
        if self._files is None:
            self._files = tempfile.TemporaryDirectory(prefix="gptq-ao-", dir=self._budget.folder)
        folder = Path(self._files.name)
        # A kernel may sum in another order if its operand is laid out in another way: keep the order of the axes.
        dense = torch.empty_like(value, device="cpu").copy_(value)
        file = _File(folder / f"{next(self._number)}.safetensors", dense.shape, dense.stride(), dense.dtype)
        try:
            save_file({"bytes": dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)}, file.path)
        except (OSError, SafetensorError) as e:
            raise ConfigError(
                f"activations that exceed max_memory go to files in {folder.parent}, which could not be written "
                f"({value.nbytes} bytes, {shutil.disk_usage(folder).free} free): {e}. Use less calibration data, "
                "allow more memory, or set TMPDIR to a larger disk"
            ) from e
        return file

    def _fetch(self, index: int, names: list[str]) -> Values:
        values = {n: self._batches[index][n] for n in names}
        if self._side is None:
            return {n: self._get(v) for n, v in values.items()}
        # After all that was offloaded so far, in a stream of its own.
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._side):
            return {n: self._get(v) for n, v in values.items()}

    def _get(self, value: Any) -> Any:
        if not isinstance(value, _Waiting):
            return value
        content = value.content
        t = content if isinstance(content, Tensor) else content.read()
        return t.to(self.device, non_blocking=True)


def _release(used: dict[str, int], place: str, size: int, file: Path | None) -> None:
    used[place] -= size
    if file is not None:
        file.unlink(missing_ok=True)


def _same(a: Any, b: Any) -> bool:
    """Whether two values are the same tensor; a size takes no room."""
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)


def compact(value: Any) -> Any:
    """A copy of a view of something larger, all of which would wait with it; anything else itself."""
    is_part = isinstance(value, Tensor) and value.untyped_storage().nbytes() > value.nbytes
    return value.clone() if is_part else value


def pinned_bytes(t: Tensor) -> int:
    """What PyTorch takes for a tensor of any shape in pinned memory: a power of two."""
    return 1 << max(t.nbytes - 1, 0).bit_length()
