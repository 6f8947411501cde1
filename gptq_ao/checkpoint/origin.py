"""Where a model came from, and what its directory holds that the model does not: it comes along when that is saved.

Such are tensors that the model's class ignores on loading (layers that predict more tokens at once), and files that are
not weights (tokenizer, processor, chat template, license, code).
"""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from gptq_ao.checkpoint.exchange.engine_names import expert_stack
from gptq_ao.checkpoint.exchange.format import Readable
from gptq_ao.checkpoint.files.directory import has_manifest, quantization_config, stored_tensors
from gptq_ao.checkpoint.files.side_files import side_files
from gptq_ao.checkpoint.formats import open_quantized
from gptq_ao.checkpoint.native.manifest import read_manifest
from gptq_ao.checkpoint.source import left_over
from gptq_ao.errors import CheckpointError
from gptq_ao.report import Report, names_of
from gptq_ao.tensor import GroupTensor

__all__ = ["Origin", "origin_of", "requantized"]

_UNQUANTIZED = {"F64", "F32", "F16", "BF16"}  # types of GGUF
_NO_CONFIG = (
    "there is no config.json (now, as seen from here, or in the hub's usual cache), and no other file of it is saved. "
    "If the model is in a folder of it, give from_pretrained the path of that folder, not subfolder="
)


@dataclass(frozen=True)
class Origin:
    """
    Attributes:
        ignored: tensors that the model's class has no use for, by its own word. They are saved as they are.
        lost: tensors that make no parameter of the model: it is only a part of what is stored. They are not saved.
        files: path in the directory → place, of what is no weight. They are copied.
        left: paths in the directory of what is not copied, see `side_files`.
        unread: why the tensors are not known, or None.
    """

    directory: Path
    ignored: Mapping[str, Readable]
    lost: tuple[str, ...]
    files: Mapping[str, Path]
    left: tuple[str, ...]
    unread: str | None = None

    @classmethod
    def at(
        cls, directory: Path, ignored: Mapping[str, Readable], lost: Iterable[str] = (), unread: str | None = None
    ) -> "Origin":
        files, left = side_files(directory)
        return cls(directory, ignored, tuple(lost), files, tuple(left), unread)

    @property
    def nbytes(self) -> int:
        """Of all that comes along."""
        return sum(t.nbytes for t in self.ignored.values()) + sum(f.stat().st_size for f in self.files.values())

    @property
    def matrices(self) -> list[str]:
        """Those tensors that are saved as they are and could be taken for weights that are quantized."""
        stacks = {n for n in self.ignored if expert_stack(n) == n.rpartition(".")[0]}
        return [n for n, t in self.ignored.items() if len(t.shape) == 2 or (len(t.shape) == 3 and n in stacks)]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Name and value of what is saved as it is, one at a time, dense (if a checkpoint has it quantized, its
        settings are those of that checkpoint)."""
        for name, stored in self.ignored.items():
            value = stored.read()
            yield name, value.dequantize() if isinstance(value, GroupTensor) else value

    def loss(self, model: Any) -> str:
        """What is not in the model."""
        what = f"{len(self.lost)} tensors of {self.directory} are not in this {type(model).__name__}"
        return f"{what}, so they are not saved: {names_of(self.lost)}"

    def notes(self, model: Any) -> tuple[str, ...]:
        """What is to be said of it, a line each."""
        kind, notes = type(model).__name__, []
        if self.ignored:
            what = f"{len(self.ignored)} tensors of {self.directory} that {kind} does not use are saved as they are"
            notes.append(f"{what}: {names_of(self.ignored)}")
        if self.lost:
            notes.append(self.loss(model))
        if self.left:
            notes.append(f"not copied from {self.directory}, as they hold other weights: {names_of(self.left)}")
        if self.unread:
            notes.append(self.doubt(model))
        return tuple(notes)

    def doubt(self, model: Any) -> str:
        """What is not known of it."""
        return (
            f"whether {self.directory} has tensors that this {type(model).__name__} has not is unknown: {self.unread}"
        )


def origin_of(model: Any) -> Origin | None:
    """The directory that a Hugging Face model was loaded from; None if it was not. Nothing is fetched, and only headers
    are read."""
    # Set by transformers, to what was given to `from_pretrained`; a config.json cannot set it.
    place = str(getattr(getattr(model, "config", None), "_name_or_path", None) or "")
    if not place or not hasattr(model, "base_model_prefix"):
        return None
    directory = _directory(place, getattr(model.config, "_commit_hash", None))
    if directory is None:
        return Origin(Path(place), {}, (), {}, (), unread=_NO_CONFIG)
    try:
        if has_manifest(directory):
            manifest = read_manifest(directory)
            return Origin.at(directory, {name: manifest.stored[name] for name in manifest.ignored})
        dense = quantization_config(directory) is None
        stored: Mapping[str, Readable] = stored_tensors(directory) if dense else open_quantized(directory).tensors
        ignored, lost = left_over(model, stored)
    except CheckpointError as e:  # pickles, say, or a format that transformers reads and this package does not
        return Origin.at(directory, {}, unread=str(e))
    return Origin.at(directory, {name: stored[name] for name in ignored}, lost)


def requantized(report: Report, model: Any) -> Report:
    """The report, which says so if the model was made of a GGUF file with quantized tensors: of which, and how many it
    had of each type."""
    made_of = getattr(getattr(model, "config", None), "requantized_from", None)
    if not isinstance(made_of, dict) or not isinstance(made_of.get("types"), dict):
        return report
    if {*made_of["types"]} <= _UNQUANTIZED:
        return report
    counts = sorted(made_of["types"].items(), key=lambda each: (-each[1], each[0]))
    types = ", ".join(f"{count} tensors {kind}" for kind, count in counts)
    file = f"{made_of.get('file')} ({types})"
    note = f"quantized again, from what another quantization had left: {file}"
    recipe = {**report.recipe, "requantized from": file}
    return dataclasses.replace(report, recipe=recipe, notes=(*report.notes, note))


def _directory(place: str, commit: str | None) -> Path | None:
    """Where the config.json is, of a directory or a model of the hub; None if it is not where it is looked for."""
    if os.path.isdir(place):
        return Path(place) if (Path(place) / "config.json").is_file() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(place, "config.json", revision=commit)
    except HFValidationError:  # it is a path that is gone
        return None
    return Path(found).parent if isinstance(found, str) else None
