"""A checkpoint in the native format while it is written: shards as they fill, the manifest last."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gptq_ao.checkpoint.files.model_config import has_config
from gptq_ao.checkpoint.files.output_directory import OutputDirectory, as_json
from gptq_ao.checkpoint.files.paths import MANIFEST
from gptq_ao.checkpoint.files.shards import NAME_OF
from gptq_ao.checkpoint.model_card import CARD, model_card
from gptq_ao.checkpoint.native.format import NATIVE
from gptq_ao.checkpoint.native.manifest import QuantizedEntry, entry_json, entry_of, format_version
from gptq_ao.checkpoint.native.read import native_config
from gptq_ao.checkpoint.native.tensors import encode_native, from_stored, stored_entry
from gptq_ao.checkpoint.origin import Origin
from gptq_ao.distributed.ranks import ALONE, Ranks
from gptq_ao.errors import CheckpointError
from gptq_ao.model.state import state_names
from gptq_ao.report import Report
from gptq_ao.tensor import GroupTensor

__all__ = ["CheckpointWriter", "stored_bytes"]


def stored_bytes(contents: Mapping[str, Tensor | QuantizedEntry]) -> int:
    """Bytes that parameters and buffers take in files. Of a tensor only shape and dtype matter; it may be on meta."""
    total = 0
    for name, what in contents.items():
        what = stored_entry(what) if isinstance(what, GroupTensor) else what
        total += what.stored_bytes(name) if isinstance(what, QuantizedEntry) else what.nbytes
    return total


class CheckpointWriter(OutputDirectory):
    """A checkpoint in the native format while it is written; see `OutputDirectory`. If several ranks write it, all add
    the same in the same order, and each stores what it has the turn for."""

    def __init__(self, directory: Path, max_shard_bytes: int, within: Path | None = None, ranks: Ranks = ALONE) -> None:
        super().__init__(directory, max_shard_bytes, within, ranks)
        self._stored = [0] * ranks.size  # bytes, by rank
        self._entries: dict[str, QuantizedEntry] = {}
        self._dense: dict[str, dict[str, Any]] = {}
        self._tied: dict[str, str] = {}
        self._ignored: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __contains__(self, name: str) -> bool:
        return name in self._entries or name in self._dense

    def add_parameter(self, name: str, value: Tensor) -> bool:
        """Store a parameter or buffer, quantized or not, of any shape. Returns whether this rank does."""
        turn = self._turn(value.nbytes)
        if turn:
            self._add_parameter(name, value)
        return turn

    def _turn(self, size: int) -> bool:
        """Whether this rank has the turn for so many bytes: whichever has stored least."""
        rank = self._stored.index(min(self._stored))
        self._stored[rank] += size
        return rank == self._ranks.rank

    def _add_parameter(self, name: str, value: Tensor) -> None:
        if isinstance(value, GroupTensor):
            self._entries[name] = stored_entry(value)
            parts = {f"{name}.{part}": t for part, t in encode_native(value).items()}
        else:
            self._dense[name] = _header(name, value)
            # A copy: a view would keep all it is a view of, and a buffer may change.
            parts = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format)}
        self.add(parts)

    def add_rest(self, model: nn.Module, get: Callable[[str], Tensor]) -> None:
        """Store what `model` has and was not added: each tensor by its first name, and which other names it has."""
        added = {name for names in self._ranks.tell([*self._entries, *self._dense]) for name in names}
        state = model.state_dict(keep_vars=True)
        # Tied parameters are one tensor with several names: stored under the first, the manifest has the others.
        for first, *others in state_names(model):
            if first not in added and self._turn(state[first].nbytes):
                self._add_parameter(first, get(first))
            self._tied |= dict.fromkeys(others, first)

    def weight(self, name: str) -> GroupTensor:
        """A quantized weight that was added."""
        return from_stored(name, self._entries[name], self.get, self.directory)

    def finish_checkpoint(
        self, model: nn.Module, tokenizer: Any, report: Report | None = None, origin: Origin | None = None
    ) -> None:
        """Write the rest, the manifest last.

        Args:
            origin: where the model came from, for what else there is.
        """
        if origin is not None and self._ranks.first:
            for name, value in origin.tensors():
                self._ignored[name] = _header(name, value)
                self.add({name: value})
        # Only now is it known how many shards there are, which is part of their names.
        placed = self.finish_shards()
        for entries, dense in self._ranks.tell([{n: entry_json(e) for n, e in self._entries.items()}, self._dense]):
            self._entries |= {name: entry_of(said) for name, said in entries.items()}
            self._dense |= dense
        if not self._ranks.first:
            return
        entries = {name: entry_json(e) for name, e in self._entries.items()}
        version = format_version(self._entries, self._ignored)
        manifest = {
            "format": "gptq_ao",
            "format_version": version,
            "quantized": entries,
            "dense": self._dense,
            "tied": self._tied,
            # Left out where there are none: files are then as they were before this was known.
            **({"ignored": self._ignored} if self._ignored else {}),
            "shards": placed,
        }
        files = {} if origin is None else origin.files
        texts = {MANIFEST: as_json(manifest)}
        if has_config(model):
            weights = [(e.bits, e.spec.group_size) for e in self._entries.values()]
            # The card first: the manifest stays the last, as it says that everything else is there.
            texts = {CARD: model_card(model, NATIVE, weights, report, origin), **texts}
        self.finish(model, tokenizer, placed, native_config(entries, version), texts, files)


def _header(name: str, t: Tensor) -> dict[str, Any]:
    """What the manifest says of a tensor that is not quantized."""
    if t.dtype not in NAME_OF:
        raise CheckpointError(f"{name!r} is of {t.dtype}, which cannot be saved")
    return {"dtype": NAME_OF[t.dtype], "shape": list(t.shape)}
