"""Safetensors files, one tensor at a time: read where it lies, written as it comes.

`safe_open` maps a whole file into memory and its tensors are views of that mapping. Here a tensor is read into memory
of its own, so what is held is what was asked for.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gptq_ao.checkpoint.files.durable import sync_file
from gptq_ao.distributed.ranks import ALONE, Ranks
from gptq_ao.errors import CheckpointError

__all__ = ["DTYPE_OF", "NAME_OF", "ShardWriter", "StoredTensor", "read_header"]

DTYPE_OF = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_OF |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
DTYPE_OF |= {"U32": torch.uint32, "BOOL": torch.bool}
# safetensors' names of dtypes, and back.
NAME_OF = {dtype: name for name, dtype in DTYPE_OF.items()}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, whose bytes begin at `offset`."""

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, device: torch.device | str = "cpu") -> Tensor:
        """The tensor, of this shape and dtype, on `device`.

        Raises:
            CheckpointError: the file has become shorter.
        """
        value = torch.empty(self.shape, dtype=self.dtype, device="cpu")
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset)
            # As bytes: numpy has no bf16. It shares the tensor's memory, so reading fills the tensor.
            rest = value.flatten().view(torch.uint8).numpy().data
            # One call may read less than was asked for: Linux returns at most 2 GiB.
            while rest and (count := file.readinto(rest)):
                rest = rest[count:]
        if rest:
            raise CheckpointError(f"{self.path} ends before byte {self.offset + self.nbytes}: it changed while in use")
        return value.to(device)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """What a file holds, in the order in which it lies there. Headers are read here and nowhere else.

    Raises:
        CheckpointError: it is not a complete safetensors file, or has a tensor of a dtype that is not supported.
    """
    try:
        # This checks sizes and offsets: tensors lie one after the other and fill the file to its end. As "pt" it would
        # map the file as private memory.
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.offset_keys()}
            entries = {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    except SafetensorError as e:
        raise CheckpointError(f"{path} is truncated, or not a safetensors file: {e}") from e
    found = {}
    end = path.stat().st_size  # counted from there: safetensors does not say how long the header is
    for name, (dtype, shape) in reversed(entries.items()):
        if dtype not in DTYPE_OF:
            raise CheckpointError(f"{path}: tensor {name!r} is of type {dtype}, which is not supported")
        end -= math.prod(shape) * DTYPE_OF[dtype].itemsize
        found[name] = StoredTensor(path, end, DTYPE_OF[dtype], shape)
    return dict(reversed(found.items()))


class ShardWriter:
    """Writes tensors into shards of at most `limit` bytes, unless a single tensor is larger.

    A shard is held in memory until it is full. `model-00001.safetensors` is written first; `finish` gives the files
    their usual names, in which the last number is that of the shards. Several ranks may write shards of one checkpoint.
    """

    def __init__(self, directory: Path, limit: int, ranks: Ranks = ALONE) -> None:
        self.directory, self.limit, self._ranks = directory, limit, ranks
        # Tensors of the shard that is being filled.
        self._pending: dict[str, Tensor] = {}
        self._size = 0
        self._placed: dict[str, int] = {}  # tensor → number of its shard
        self._count = 0
        self._headers: dict[int, dict[str, StoredTensor]] = {}  # of the shards that were read again

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over tensors on the CPU, name → tensor; the caller must not change them any more.

        Raises:
            CheckpointError: there is one of that name already.
        """
        for name, tensor in tensors.items():
            if name in self._pending or name in self._placed:
                raise CheckpointError(f"two tensors would be called {name!r}: the model has a parameter of that name")
            # A tensor larger than the limit gets a shard of its own.
            if self._pending and self._size + tensor.nbytes > self.limit:
                self._flush()
            self._pending[name] = tensor
            self._size += tensor.nbytes

    def get(self, name: str) -> Tensor:
        """A tensor that was added, from memory or from its file."""
        if name in self._pending:
            return self._pending[name]
        number = self._placed[name]
        if number not in self._headers:
            self._headers[number] = read_header(self._path(number))
        return self._headers[number][name].read()

    def finish(self) -> dict[str, str]:
        """Write what is left. Returns tensor → file, of all ranks, whose files are there."""
        # A model without tensors has one shard, an empty one.
        if self._pending or (not self._placed and self._ranks.first):
            self._flush()
        counts = self._ranks.tell(self._count)
        before, of = sum(counts[: self._ranks.rank]), sum(counts)
        files = {n: f"model-{before + n:05}-of-{of:05}.safetensors" for n in range(1, self._count + 1)}
        for number, file in files.items():
            self._path(number).rename(self.directory / file)
            if self._ranks.size > 1:  # each on its own machine
                sync_file(self.directory / file)
        placed: dict[str, str] = {}
        for theirs in self._ranks.tell({name: files[number] for name, number in self._placed.items()}):
            placed |= theirs
        return placed

    def _flush(self) -> None:
        self._count += 1
        save_file(self._pending, self._path(self._count), metadata={"format": "pt"})
        self._placed |= dict.fromkeys(self._pending, self._count)
        self._pending, self._size = {}, 0

    def _path(self, number: int) -> Path:
        whose = f"rank-{self._ranks.rank}-" if self._ranks.size > 1 else ""
        return self.directory / f"{whose}model-{number:05}.safetensors"
