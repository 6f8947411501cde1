"""quantize_checkpoint: from a directory to a directory, for models that do not fit in memory.

The pipeline is that of `quantize_`. Only its weights are elsewhere: read from the source when a segment of the graph
needs them, written to the new checkpoint when they are solved, and read back from there by the segment that follows.
"""

import dataclasses
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gptq_ao.checkpoint.files.output_directory import check_empty
from gptq_ao.checkpoint.native.write import CheckpointWriter
from gptq_ao.checkpoint.origin import Origin
from gptq_ao.checkpoint.source import Source, open_source
from gptq_ao.config import GPTQConfig
from gptq_ao.distributed.ranks import ALONE, Ranks
from gptq_ao.errors import CheckpointError, ConfigError
from gptq_ao.journal.journal import Journal, journal_beside
from gptq_ao.model.inspection import check_values
from gptq_ao.pipeline.journaled import facts_of_files
from gptq_ao.pipeline.quantize import quantize_weights
from gptq_ao.planning.job import FilterFn, Job
from gptq_ao.planning.limits import MaxMemory
from gptq_ao.progress import Progress
from gptq_ao.quality.check import QualityCheck
from gptq_ao.report import Report
from gptq_ao.tensor import GroupTensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["journal_of", "quantize_checkpoint"]


def quantize_checkpoint(
    source: str | Path,
    out: str | Path,
    config: GPTQConfig,
    filter_fn: FilterFn | None = None,
    device: torch.device | str | None = None,
    *,
    max_memory: MaxMemory | None = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    tokenizer: Any = None,
    max_shard_bytes: int = 2**30,
    progress: Progress | None = None,
    distributed: bool = False,
    process_group: "ProcessGroup | None" = None,
    resume: bool | Journal = False,
    snapshot_every: int = 0,
    output_sharding: str = "first",
    quality: QualityCheck | None = None,
) -> Report:
    """Quantize the Hugging Face model in the directory `source` and write it to the directory `out`, as `quantize_` and
    `save_quantized` would, tensor by tensor the same. At no time is the model in memory: only the weights that run or
    are solved at the moment, the activations of the calibration data, and a shard of the result.

    Nothing is left at `out`, whatever is raised; beside it, what was finished is.

    Args:
        config, filter_fn, progress, distributed, process_group: see `quantize_`. Each rank reads `source` by itself,
            and rank 0 writes `out`.
        output_sharding: "rank": every rank writes shards of `out`, of about as many bytes; all see that directory.
            "first": rank 0 writes all.
        device: where to compute; None: on the CPU.
        max_memory: see `quantize_`.
        dtype: of the model before quantization; None: as stored.
        trust_remote_code: whether to run code that came with the model, if that is what makes it.
        tokenizer: to be saved with the model.
        max_shard_bytes: size of the files, and of the part of the result that is held in memory.
        resume: whether to go on with what a run to `out` that did not end has left, in a hidden directory beside it, if
            there is such; see docs/large-models.md. If not, such work is an error, and nothing of it is removed.
        snapshot_every, quality: see `quantize_`. Both models run layer by layer, with their weights from the files.

    Raises:
        CalibrationError, CaptureError, ConfigError, NoLinearError: as `quantize_`.
        NonFiniteError, QualityError, RankError, SolverError: as `quantize_`.
        CheckpointError: `source` is unsafe, incomplete or does not fit its config; `out` holds something; the disk is
            full; another process writes there, or a run that did not end has left its work and `resume` is False.
    """
    if output_sharding not in ("first", "rank"):
        raise ConfigError(f'output_sharding is {output_sharding!r}: give "first" or "rank", who writes the shards')
    ranks = Ranks.of(distributed, process_group, None if device is None else torch.device(device))
    with ranks.together(), ExitStack() as until_done:
        said = ranks.tell(output_sharding)
        if len(set(said)) > 1:
            raise ConfigError(f"the ranks were given different output_sharding, {said}: give the same on all")
        if not Path(source).is_dir():
            raise CheckpointError(f"{str(source)!r} is not a directory: download the model first (`hf download`)")
        journal, writer, growing = None, None, None
        if ranks.first:
            journal = resume if isinstance(resume, Journal) else None
            if journal is None:
                how = f"quantize_checkpoint(…, {str(out)!r}, …, resume=True)"
                opening = journal_of(Path(out), resume=bool(resume), how=how, snapshot_every=snapshot_every)
                journal = until_done.enter_context(opening)
            growing = journal.growing()
        if ranks.first or output_sharding == "rank":
            writing = ranks if output_sharding == "rank" else ALONE
            writer = until_done.enter_context(CheckpointWriter(Path(out), max_shard_bytes, growing, writing))
        opened = open_source(Path(source), dtype, trust_remote_code=trust_remote_code)
        origin = Origin.at(Path(source), opened.ignored)
        weights = CheckpointWeights(opened, writer)
        job = Job.of(weights, config, filter_fn, device, max_memory, progress, ranks)
        job = dataclasses.replace(job, journal=journal, source=facts_of_files(Path(source)))
        report = quantize_weights(job, origin, quality)
        if writer is not None:
            writer.add_rest(weights.model, weights.get)
            if journal is not None:
                journal.written()
            writer.finish_checkpoint(weights.model, tokenizer, report, origin)
        if journal is not None and not isinstance(resume, Journal):
            journal.remove()
    return report


def journal_of(out: Path, *, resume: bool, how: str, snapshot_every: int) -> Journal:
    """That of a run to `out`, where nothing is.

    Args:
        how: to go on with it.

    Raises:
        CheckpointError: see `quantize_checkpoint`.
    """
    place = journal_beside(out)
    try:
        check_empty(out)
    except CheckpointError as e:
        if place.is_dir() and not place.is_symlink():
            with Journal(place, resume=True, how=how, ours=True) as journal:
                # Nothing was there when it began, and nothing is written into a place that is not locked.
                if journal.step("written") is not None:
                    journal.remove()
                    raise CheckpointError(
                        f"{out} is complete: the run that wrote it was ended when all was done"
                    ) from e
        raise
    return Journal(place, resume=resume, required=resume, how=how, snapshot_every=snapshot_every, ours=True)


class CheckpointWeights:
    """The `Weights` of a model on disk: quantized ones in the new checkpoint, others in the source. Those that another
    rank writes are in memory until the last segment that needs them has run."""

    def __init__(self, source: Source, writer: CheckpointWriter | None) -> None:
        self.model: nn.Module = source.model
        self._source, self._writer = source, writer
        self._kept: dict[str, Tensor] = {}  # what another rank writes
        self._selected: frozenset[str] = frozenset()

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def home(self, name: str, *, quantized: bool = False) -> torch.device | None:
        return torch.device("cpu") if not quantized and name not in self._source.conversions else None

    def check(self, names: Iterable[str], result_bytes: Callable[[], int]) -> None:
        """There is room for the result. The values of weights are checked when they are read."""
        self._selected = frozenset(names)
        if self._writer is not None:
            self._writer.check_space(result_bytes())

    def get(self, name: str, device: torch.device | None = None) -> Tensor:
        """See `Weights`.

        Raises:
            NonFiniteError: it is to be quantized, and has an element that is NaN or infinite.
        """
        if name in self._kept:
            value = self._kept[name]
        elif self._writer is not None and name in self._writer:
            value = self._writer.weight(name)
        elif name in self._source.conversions:
            value = self._source.read(name)
        else:
            value = self.model.get_buffer(name)
        if name in self._selected and not isinstance(value, GroupTensor):
            check_values([(name, value)])
        return value.to(device or value.device)

    def replace(self, name: str, new: Tensor) -> None:
        """See `Weights`. It goes to a file, and is read from there when a later segment needs it."""
        if self._writer is None or not self._writer.add_parameter(name, new):
            self._kept[name] = new.to("cpu")

    def release(self, name: str) -> None:
        """See `Weights`."""
        self._kept.pop(name, None)
