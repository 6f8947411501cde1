"""Where the live activations of the calibration batches wait between two segments.

On the device that computes, as long as a budget allows; then in pinned host memory; then in files. What waits elsewhere
is brought back while the batch before it is still being computed.
"""

import itertools
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["ActivationStore", "Budget"]

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


class _Waiting:
    """One value in its place: a tensor, or the path of a file. Gives its bytes back when nothing refers to it."""

    def __init__(self, store: "ActivationStore", place: str, content: Tensor | Path, size: int) -> None:
        self.content = content
        store.used[place] += size
        store.peak[place] = max(store.peak[place], store.used[place])
        weakref.finalize(self, _release, store.used, place, size, content if isinstance(content, Path) else None)


class ActivationStore:
    """Per batch, the values that later segments read, by name. A context manager: its files are gone at the end.

    Attributes:
        used, peak: bytes now, and at most so far, by place: "device", "host", "disk".
    """

    def __init__(self, batches: Iterable[Values], device: torch.device, budget: Budget | None = None) -> None:
        self.used = {"device": 0, "host": 0, "disk": 0}
        self.peak = dict(self.used)
        self._device, self._budget = device, budget or Budget()
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._files: tempfile.TemporaryDirectory[str] | None = None
        self._number = itertools.count()
        self._batches: list[Values] = []
        before: Values = {}
        for batch in batches:
            # A mask that is the same in every batch is stored once.
            same = {n for n, t in batch.items() if n in before and torch.equal(t, before[n])}
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
            values = coming
            if self._side is not None:
                compute = torch.cuda.current_stream(self._device)
                compute.wait_stream(self._side)
                for t in values.values():
                    if isinstance(t, Tensor):
                        t.record_stream(compute)
            coming = self._fetch(index + 1, names) if index + 1 < len(self) else {}
            yield values

    def replace(self, index: int, written: Values, keeps: Iterable[str]) -> None:
        """Keep of a batch only `keeps`: those in `written`, on the device, and of the rest what is stored."""
        old = self._batches[index]
        self._batches[index] = {}  # what is not kept gives way first
        kept = {n: old[n] for n in keeps if n not in written}
        del old
        self._batches[index] = {n: kept[n] if n in kept else self._put(written[n]) for n in keeps}

    def _put(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value  # a size
        size, budget = value.nbytes, self._budget
        if budget.device is None or self.used["device"] + size <= budget.device:
            return _Waiting(self, "device", value.to(self._device), size)
        if self._side is not None and (budget.host is None or self.used["host"] + size <= budget.host):
            host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            return _Waiting(self, "host", host.copy_(value, non_blocking=True), size)
        if self._files is None:
            self._files = tempfile.TemporaryDirectory(prefix="gptq-ao-", dir=budget.folder)
        path = Path(self._files.name) / f"{next(self._number)}.safetensors"
        save_file({"value": value.contiguous()}, path)
        return _Waiting(self, "disk", path, size)

    def _fetch(self, index: int, names: list[str]) -> Values:
        values = {n: self._batches[index][n] for n in names}
        if self._side is None:
            return {n: self._get(v) for n, v in values.items()}
        # After all that was offloaded so far, in a stream of its own.
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side):
            return {n: self._get(v) for n, v in values.items()}

    def _get(self, value: Any) -> Any:
        if not isinstance(value, _Waiting):
            return value
        content = value.content
        t = content if isinstance(content, Tensor) else load_file(content)["value"]
        return t.to(self._device, non_blocking=True)


def _release(used: dict[str, int], place: str, size: int, file: Path | None) -> None:
    used[place] -= size
    if file is not None:
        file.unlink(missing_ok=True)
